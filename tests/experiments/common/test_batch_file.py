"""A file of requests is read a window at a time, and what it holds is known before."""

import gzip
import io
import json
import types

import pytest

from experiments.common import batch_file
from experiments.common.batch_file import Line, RequestFile, read_lines, standard_input
from tests.experiments.common.test_batch_requests import call, reader


def opened(tmp_path, content, window=2):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    return RequestFile(open(path, "rb"), "prompts.jsonl", reader(), window)


def test_only_a_line_feed_ends_a_line_and_blank_ones_count():
    content = b"\xef\xbb\xbf" + "a\u2028b\u0085c\r\n\r\n \nd".encode()
    expected = [Line(1, 0, "a\u2028b\u0085c\r".encode()), Line(4, 17, b"d")]
    assert list(read_lines(io.BytesIO(content), 20)) == expected
    assert list(read_lines(io.BytesIO(content), 20, 17, 4)) == expected[1:]


@pytest.mark.parametrize("end", [b"", b"\n", b"\nabc"])
def test_a_line_that_is_too_long_is_passed_over_and_known(end, monkeypatch):
    monkeypatch.setattr(batch_file, "_STEP", 8)
    found = list(read_lines(io.BytesIO(b"abcde\n" + b"x" * 100 + end), 5))
    assert found == [Line(1, 0, b"abcde"), Line(2, 6, None), *([Line(3, 107, b"abc")] if end == b"\nabc" else [])]


def test_what_a_file_holds_is_known_before_it_is_read(tmp_path):
    lines = [
        b'{"prompt": "ab"}',
        b"",
        b'{"prompt": ""}',
        b"nonsense",
        b'{"prompt": "abcd", "max_tokens": 9}',
        b'{"tokens": [999]}',
    ]
    found = opened(tmp_path, b"\n".join(lines))
    assert list(found.scan.bad) == [0, 1, 1, 0, 1] and (found.scan.requests, found.scan.failed) == (5, 3)
    assert list(found.scan.errors) == [3, 4, 6] and found.scan.errors[3] == "prompt: is empty"
    assert (found.scan.longest, found.scan.most_new) == (4, 9)
    assert list(found.numbers()) == [(1, False), (3, True), (4, True), (5, False), (6, True)]
    assert [[r.line for r in window] for window in found.windows(0)] == [[1, 3], [4, 5], [6]]
    assert [[r.line for r in window] for window in found.windows(2)] == [[6]]
    assert list(found.windows(3)) == []


def test_a_custom_id_that_is_there_twice_is_named_with_both_lines(tmp_path):
    own = json.dumps({"prompt": "a", "custom_id": "x"}).encode()  # whose answers have their lines
    lines = [json.dumps(call(prompt="a", custom_id=name)).encode() for name in ("x", "y", "z", "y", "x")]
    assert opened(tmp_path, b"\n".join([own, own, *lines[:3]])).scan.failed == 0
    with pytest.raises(ValueError, match=r"^prompts\.jsonl: line 6: custom_id: 'y' is that of line 3 too$"):
        opened(tmp_path, b"\n".join([own, lines[0], lines[1], b"", lines[2], lines[3], lines[4]]))


def test_the_checksum_is_of_lines_and_of_their_tokens(tmp_path, monkeypatch):
    def checksum(content):
        return opened(tmp_path, content).scan.checksum

    base = checksum(b'{"prompt": "ab"}\n')
    assert checksum(b'{"prompt": "ab"}\n') == base != checksum(b'{"prompt": "ac"}\n')
    monkeypatch.setattr("experiments.common.text.Bytes.encode", lambda self, text, begins=True, ends=True: [1, 2])
    assert checksum(b'{"prompt": "ab"}\n') != base


def test_a_file_without_lines_and_one_that_changes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.jsonl: holds no lines"):
        opened(tmp_path, b"\n \n")
    found = opened(tmp_path, b'{"prompt": "a"}\n')
    with open(tmp_path / "prompts.jsonl", "ab") as file:
        file.write(b"more\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl: was changed while it was read"):
        next(found.windows(0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"prompt": "a"}'), "prompts.jsonl: is compressed by gzip"),
        ('{"prompt": "a"}'.encode("utf-16"), "prompts.jsonl: is UTF-16; convert it"),
        (b'[\n{"prompt": "a"}\n]', "prompts.jsonl: begins a JSON array; what is read has an object in every line"),
    ],
    ids=["gzip", "utf-16", "array"],  # gzip's bytes hold the time, and every worker has to collect the same names
)
def test_a_file_of_another_format_is_refused_whole(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, content)
    assert opened(tmp_path, b'[1]\n{"prompt": "a"}').scan.failed == 1


def test_few_errors_are_kept_however_many_there_are(tmp_path):
    found = opened(tmp_path, b"nonsense\n" * 250)
    assert found.scan.failed == 250 and list(found.scan.errors) == list(range(1, 101))


def test_standard_input_is_kept_in_a_file_without_a_name(tmp_path, monkeypatch):
    content = json.dumps({"prompt": "a"}).encode() + b"\n"
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content * 3)))
    with standard_input(tmp_path) as file:
        assert list(tmp_path.iterdir()) == []
        assert RequestFile(file, "standard input", reader(), 2).scan.requests == 3
