"""Documents, tokenizers and the split by name."""

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
    with pytest.raises(ValueError, match="no.txt': no such file"):
        text.documents(f"{folder}/file1.py,{folder}/no.txt")
    with pytest.raises(ValueError, match="'': no such file"):
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


def test_a_folder_without_python_files_is_not_called_missing(tmp_path):
    (tmp_path / "a.txt").write_text("word")
    with pytest.raises(ValueError, match=r"a folder without \.py files; for others name them, as .*/\*\*/\*\.txt"):
        text.documents(str(tmp_path))


def test_text_that_is_too_short_holds_no_sequence():
    with pytest.raises(ValueError, match="0 tokens hold 0 sequences"):
        text.sequences(np.zeros(0, np.int32), 1, 20, seed=0)
