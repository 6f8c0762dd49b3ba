"""Documents, tokenizers and the split by name."""

import gzip

import numpy as np
import pytest
import tokenizers

from experiments.common import text


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"file{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("no")
    return tmp_path


def test_a_folder_or_a_glob_gives_its_files(folder):
    assert len(text.documents(str(folder))) == 40
    assert len(text.documents(f"{folder}/file1*.py")) == 11
    with pytest.raises(ValueError, match="nothing matches"):
        text.documents(f"{folder}/*.txt")


def test_names_start_where_the_pattern_first_varies(folder):
    found = text.documents(f"{folder}/site-*/*.py,{folder}/**/file1.py")
    assert [d.name for d in found] == ["site-packages/other.py", "file1.py"]
    assert all(d.path.is_file() for d in found)
    with pytest.raises(ValueError, match="--text=.*no.txt: no such file"):
        text.documents(f"{folder}/file1.py,{folder}/no.txt")
    with pytest.raises(ValueError, match="--text=.*: holds an empty name"):
        text.documents(f"{folder}/file1.py,")


def test_what_is_installed_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "code.py").write_text("x = 1")
    (tmp_path / "some" / "table.py").write_text("1, " * 100_000)
    (tmp_path / "some" / "about.md").write_text("word " * 1000)
    (tmp_path / "some" / "short.txt").write_text("word")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.name for d in text.documents("installed-code,installed-prose")] == ["some/code.py", "some/about.md"]


def test_the_split_goes_by_name_alone(folder):
    sides = {d.name: d.held_out for d in text.documents(str(folder))}
    assert 0 < sum(sides.values()) < 12
    assert text.Document("file3.py", folder / "elsewhere").held_out == sides["file3.py"]


def test_the_standard_library_has_text_on_both_sides():
    found = text.documents("")
    assert any(d.name == "ast.py" for d in found) and not any("site-packages" in d.name for d in found)
    assert 0.05 < sum(d.held_out for d in found) / len(found) < 0.15


def test_stream_ends_documents_and_stops_past_its_limit(folder):
    found = text.documents(f"{folder}/file[12].py")
    np.testing.assert_array_equal(text.stream(found, text.Bytes(), 256), [*b"x = 1\n", 256, *b"x = 2\n", 256])
    assert text.stream(found, text.Bytes(), None, limit=3).size == 6


def test_sequences_are_distinct_seeded_cuts():
    cuts = text.sequences(np.arange(101), 5, 20, seed=1)
    assert sorted(cuts[:, 0]) == [0, 20, 40, 60, 80] and np.all(np.diff(cuts) == 1) and cuts.shape == (5, 21)
    np.testing.assert_array_equal(cuts, text.sequences(np.arange(101), 5, 20, seed=1))
    with pytest.raises(ValueError, match="hold 5 sequences of 20, but 6"):
        text.sequences(np.arange(101), 6, 20, seed=1)


def test_a_checkpoints_own_tokenizer_or_bytes(tmp_path):
    assert text.tokenizer(tmp_path, 258).encode("é".encode()).tolist() == [0xC3, 0xA9]
    vocabulary = {"[UNK]": 0, "def": 1, "x": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    found = text.tokenizer(tmp_path, 258)
    assert found.encode(b"def x y").tolist() == [1, 2, 0] and found.decode([1, 2]) == "def x"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        text.tokenizer(tmp_path, 258)


def test_a_tokenizer_made_here_cuts_a_word_the_same_wherever_it_stands(folder):
    documents = text.documents(str(folder))
    made = text.train_tokenizer(documents, 270, folder / "tokenizer.json", 0)
    assert text.tokenizer(folder, 270).name == made.name
    sample = "x = 12\n\té [qzv] == 'qzv'\n"
    assert made.decode(made.encode(sample.encode())) == sample
    word = made.encode(b"qzv").tolist()
    for around in ("\nqzv = 1", "'qzv'\n", "assert qzv == 'a'", "x_qzv_0"):
        left, right = around.split("qzv")
        parts = [part.encode() for part in (left, "qzv", right)]
        assert made.encode(around.encode()).tolist() == [t for part in parts for t in made.encode(part).tolist()]
        assert word == made.encode(parts[1]).tolist()
    many = made.encode_many([b"x = 1", b"", b"qzv"])
    assert [m.tolist() for m in many] == [made.encode(b).tolist() for b in (b"x = 1", b"", b"qzv")]


def test_a_tokenizer_is_made_once(folder):
    path = folder / "tokenizer.json"
    text.train_tokenizer(text.documents(str(folder)), 260, path, 0)
    before = path.read_bytes()
    text.train_tokenizer(text.documents(f"{folder}/file1.py"), 300, path, 1)
    assert path.read_bytes() == before


def test_a_file_found_twice_counts_once(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / "a" / f"{i}.txt").write_text("word")
    found = text.documents(f"{tmp_path}/**/*.txt,{tmp_path}/a/*.txt")
    assert len(found) == 20 and all(d.name.startswith("a/") for d in found)


def test_a_folder_takes_its_text_files(tmp_path):
    for name in (
        "a.txt",
        "b.MD",
        "c.rst",
        "d.py",
        "e.bin",
        "f.pdf",
        ".hidden.txt",
        "deep/er/g.tex",
        ".git/h.txt",
        "node_modules/i.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("word")
    assert [d.name for d in text.documents(str(tmp_path))] == ["a.txt", "b.MD", "c.rst", "d.py", "deep/er/g.tex"]


def test_a_folder_without_text_files_is_not_called_missing(tmp_path):
    (tmp_path / "a.log").write_text("word")
    with pytest.raises(ValueError, match=r"a folder without files called as text is \(\.txt, .*\); name others, as .*/\*\*/\*"):
        text.documents(str(tmp_path))


LINES = (
    '{"text": "one"}\n\n'
    '{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "\\u00e9"}], "id": 5}\n'
    '{"text": "last"}'
)


def test_every_line_of_jsonl_is_a_document(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    found = text.documents(f"{tmp_path}/a.jsonl,{tmp_path}/*.jsonl")
    assert [(d.name, d.content().decode()) for d in found] == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "two\n\n\u00e9"),
        ("a.jsonl:4", "last"),
    ]
    np.testing.assert_array_equal(text.stream(found[::2], text.Bytes(), 256), [*b"one", 256, *b"last", 256])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', 'line 2: has neither a "text" nor "messages"'),
        ('{"prompt": "a"}', 'line 2: has neither a "text" nor "messages"'),
        ('{"messages": [{"role": "user"}]}', 'line 2: has neither a "text" nor "messages"'),
        ('{"messages": ["a"]}', 'line 2: has neither a "text" nor "messages"'),
        ('{"messages": [{"content": [{"type": "image"}]}]}', 'line 2: has neither a "text" nor "messages"'),
        ("plain text", "line 2: cannot be read as JSON"),
        ("[1]", "line 2: holds list, not an object"),
    ],
)
def test_a_line_that_holds_no_text_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl: {message}"):
        text.documents(f"{tmp_path}/a.jsonl")[1].content()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"%PDF-1.7\n1 0 obj", "is a PDF, not text"),
        (gzip.compress(b"words", mtime=0), "is compressed by gzip, not text"),
        (b"PK\x03\x04....", "is a zip archive, as docx and epub are, not text"),
        (b"PAR1....", "is a Parquet table, not text"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "is a Git LFS pointer .git lfs pull gets the file., not text",
        ),
        (b"words\x00more", "is not text: byte 5 is 0"),
        (b"\xff\xfew", "begins like utf-16, but is none"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(tmp_path, content, message):
    for name in ("a.txt", "a.jsonl") if "not text" in message else ("a.txt",):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message if name == "a.txt" else "not text|cannot be read as JSON"):
            text.stream(text.documents(f"{tmp_path}/{name}"), text.Bytes(), None)


def test_text_in_an_encoding_that_nobody_names_is_refused_unless_nobody_can_change_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("caf\u00e9 noir, s'il vous pla\u00eet".encode("latin1"))
    with pytest.raises(ValueError, match="a.txt: is not UTF-8: byte 3 is 0xe9; convert it"):
        text.documents(str(path))[0].content()
    assert text.Document("a.txt", path, named=False).content() == path.read_bytes()
    assert not any(document.named for document in text.documents("standard-library"))
    path.write_bytes(b"one stray byte \xe9 " + 2000 * b"x")
    assert text.documents(str(path))[0].content() == path.read_bytes()


@pytest.mark.parametrize("name", ["a.json", "a.txt", "data"])
def test_jsonl_is_known_by_its_first_line_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert [document.content().decode() for document in text.documents(f"{tmp_path}/{name}")] == [
        "one",
        "two\n\n\u00e9",
        "last",
    ]
    for other in ('{"name": "x"}', "{\n}", '{"text": 5}', "{text}", ""):
        (tmp_path / name).write_text(other)
        assert text.documents(f"{tmp_path}/{name}")[0].content() == other.encode()


def test_a_json_array_is_no_text(tmp_path):
    (tmp_path / "a.json").write_text('\n[{"text": "one"}]')
    with pytest.raises(ValueError, match="a.json: is a JSON array, not text; what is read has an object in every line"):
        text.documents(f"{tmp_path}/a.json")[0].content()


def test_contents_of_messages_may_be_parts_of_text(tmp_path):
    parts = '[{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{{"content": {parts}}}]}}\n')
    assert text.documents(f"{tmp_path}/a.jsonl")[0].content() == b"one two"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("é words", encoding=encoding)
    assert text.documents(f"{tmp_path}/a.txt")[0].content() == "é words".encode()


def test_text_that_is_too_short_holds_no_sequence():
    with pytest.raises(ValueError, match="0 tokens hold 0 sequences"):
        text.sequences(np.zeros(0, np.int32), 1, 20, seed=0)
