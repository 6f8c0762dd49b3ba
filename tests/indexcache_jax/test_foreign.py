"""What strangers wrote is read only from small regular files, and shown without what drives a terminal."""

import os

import pytest

from indexcache_jax import foreign

HOSTILE = "\x1b]0;owned\x07\x1b[31m\nred\r\u202egnp.exe\u2028\ud800\x00"


def test_foreign_text_is_escaped_and_cut():
    for text in (foreign.shown(HOSTILE), foreign.escaped(HOSTILE), foreign.shown([HOSTILE]), foreign.shown({HOSTILE: 1})):
        assert text.isprintable() and "owned" in text
    assert foreign.escaped("layers.0") == "layers.0" and foreign.shown("a") == "'a'" and foreign.shown(None) == "None"
    for value in ("x" * 10**7, ["x"] * 10**5, 10**4000, 10**5000):
        assert len(foreign.shown(value)) < 210
    assert len(foreign.escaped("x" * 1000)) < 210


@pytest.mark.parametrize("name", [HOSTILE, "", "a\n", "x" * 201, 5, None])
def test_what_is_no_name(name):
    assert not foreign.is_name(name)
    assert foreign.is_name("model.layers.0.mlp")


def test_json_objects_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "\u00e4"]}', encoding="utf-8")
    assert foreign.read_json(tmp_path / "a.json") == {"a": [1, "\u00e4"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds list, not an object"),
        (b"", "cannot be read as JSON"),
        (b'{"a": 1', "cannot be read as JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"b": {"\\u001b[0m": 1, "\\u001b[0m": 2}}', r"the key '\\x1b\[0m' is there twice"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 at byte 0"),
        (b'{"a": "\xe4"}', "is not UTF-8 at byte 7"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON: Unexpected UTF-8 BOM"),
        (b" " * 2000, "has 2000 bytes, more than the 1000"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_small_json_object_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        foreign.read_json(path, 1000 if len(content) == 2000 else foreign.MAX_SMALL)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    """A pipe without a writer would wait for ever, /dev/zero would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(ValueError, match=f"{name}: (not a regular file|cannot be read)"):
            foreign.read_json(tmp_path / name)
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(ValueError, match="broken: no such file, but a link to one"):
        foreign.read_json(tmp_path / "broken")
    with pytest.raises(ValueError, match="missing: no such file$"):
        foreign.read_json(tmp_path / "missing")
