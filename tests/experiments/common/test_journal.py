"""Logs that are continued after a kill: what is kept, what is dropped, what is refused."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from experiments.common import journal
from experiments.common.journal import Journal

ABOUT = {"weights": 7, "flags": {"context": 24, "schedule": ["F", "S"]}}
ENTRIES = [{"step": 0, "loss": 1.5}, {"step": 1, "loss": 0.25, "note": "naïve\n"}, {"step": 2, "loss": 1e-30}]
FIELDS = {"step": int, "loss": float}


def written(path, entries=ENTRIES, about=ABOUT, **options):
    with Journal(path, about, **options) as log:
        for entry in entries:
            log.append(entry)
    return path.read_bytes()


# ---- what a file holds


def test_the_first_line_says_what_the_entries_depend_on_and_each_entry_is_a_line(tmp_path):
    lines = written(tmp_path / "log").decode().splitlines()
    assert [json.loads(line) for line in lines] == [ABOUT, *ENTRIES]


def test_what_entries_depend_on_may_stand_in_a_file_of_its_own(tmp_path):
    content = written(tmp_path / "log", about_path=tmp_path / "about.json")
    assert [json.loads(line) for line in content.splitlines()] == ENTRIES
    assert json.loads((tmp_path / "about.json").read_text()) == ABOUT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "log"]


def test_a_log_whose_owner_is_checked_elsewhere_holds_entries_alone(tmp_path):
    content = written(tmp_path / "log", about=None)
    assert [json.loads(line) for line in content.splitlines()] == ENTRIES
    assert journal.read(tmp_path / "log") == ENTRIES


def test_an_entry_is_in_the_file_once_it_is_appended(tmp_path):
    """A process that is killed, with no chance to close anything."""
    program = (
        "import sys, time; from experiments.common.journal import Journal; log = Journal(sys.argv[1], {'weights': 7});"
        "log.append({'step': 0}); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Journal(tmp_path / "log", {"weights": 7}).entries == [{"step": 0}]


# ---- going on


@pytest.mark.parametrize("beside", [False, True], ids=["first line", "file of its own"])
def test_a_log_opened_again_knows_its_entries_and_goes_on(tmp_path, beside):
    options = {"about_path": tmp_path / "about.json"} if beside else {}
    written(tmp_path / "log", ENTRIES[:1], **options)
    with Journal(tmp_path / "log", ABOUT, fields=FIELDS, **options) as log:
        assert log.entries == ENTRIES[:1]
        for entry in ENTRIES[1:]:
            log.append(entry)
    whole = written(tmp_path / "whole", about_path=tmp_path / "whole.json") if beside else written(tmp_path / "whole")
    assert (tmp_path / "log").read_bytes() == whole


@pytest.mark.parametrize("about", [ABOUT, None], ids=["with a first line", "without"])
def test_cut_at_any_byte_it_keeps_the_whole_lines_and_continues_to_the_same_file(tmp_path, about):
    path = tmp_path / "log"
    whole = written(path, about=about)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        with Journal(path, about) as log:
            assert log.entries == ENTRIES[: max(0, lines - (about is not None))]
            for entry in ENTRIES[len(log.entries) :]:
                log.append(entry)
        assert path.read_bytes() == whole


def test_a_last_line_without_a_line_feed_is_dropped_even_where_it_is_whole_json(tmp_path):
    """Its writer was killed: the number that ends it may have had more digits."""
    path = tmp_path / "log"
    path.write_bytes(written(path) + b'{"step": 3, "loss": 2.0}')
    assert Journal(path, ABOUT).entries == ENTRIES


def test_an_empty_file_is_a_log_that_was_just_begun(tmp_path):
    (tmp_path / "empty").touch()
    assert written(tmp_path / "empty") == written(tmp_path / "new")


def test_entries_beyond_those_to_keep_are_dropped_unread(tmp_path):
    path = tmp_path / "log"
    whole = written(path, about=None)
    for keep in range(4):
        path.write_bytes(whole + b"nonsense\n")
        assert Journal(path, None, keep=keep).entries == ENTRIES[:keep]
        assert path.read_bytes().count(b"\n") == keep
    assert Journal(path, None, keep=9).entries == ENTRIES


def test_reading_takes_the_whole_lines_and_leaves_the_file_as_it_is(tmp_path):
    path = tmp_path / "log"
    torn = written(path, about=None) + b'{"step": 3'
    path.write_bytes(torn)
    assert journal.read(path) == ENTRIES and path.read_bytes() == torn


# ---- what is refused, and left as it is


def refused(path, message, about=ABOUT, **options):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}"):
        Journal(path, about, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("beside", [False, True], ids=["first line", "file of its own"])
@pytest.mark.parametrize(
    "about, message",
    [
        (ABOUT | {"weights": 8}, r"was made with another weights: 7 there, 8 here \(--checkpoint .*\); give "),
        (ABOUT | {"flags": {"context": 32, "schedule": []}}, r"was made with another flags\.context: 24 there, 32 here"),
        (
            ABOUT | {"flags": {"context": 24, "schedule": ["F", "F"]}},
            r"was made with another flags\.schedule\[1\]: 'S' there, 'F' here",
        ),
        (ABOUT | {"seed": 0}, r"was made with another seed: '\(missing\)' there, 0 here"),
        ({"weights": 7}, r"was made with another flags: .* there, '\(missing\)' here"),
    ],
)
def test_another_runs_log_is_refused_by_its_first_difference(tmp_path, about, message, beside):
    options = {"about_path": tmp_path / "about.json"} if beside else {}
    written(tmp_path / "log", **options)
    refused(tmp_path / "log", message, about, **options)


def test_what_json_turns_into_something_else_is_still_the_same(tmp_path):
    about = {"flags": ("a", "b"), "steps": {1: 2}}
    written(tmp_path / "log", about=about)
    assert Journal(tmp_path / "log", about).entries == ENTRIES


def test_a_log_whose_description_is_missing_is_refused(tmp_path):
    written(tmp_path / "log", about_path=tmp_path / "about.json")
    (tmp_path / "about.json").unlink()
    with pytest.raises(ValueError, match=r"about\.json: is missing, so what .*log was made with is not known"):
        Journal(tmp_path / "log", ABOUT, about_path=tmp_path / "about.json")
    (tmp_path / "about.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"about\.json: line 1 is not a JSON object"):
        Journal(tmp_path / "log", ABOUT, about_path=tmp_path / "about.json")


def test_a_description_without_its_log_is_of_a_run_that_wrote_nothing(tmp_path):
    written(tmp_path / "log", about={"weights": 1}, about_path=tmp_path / "about.json")
    (tmp_path / "log").unlink()
    written(tmp_path / "log", about_path=tmp_path / "about.json")
    assert json.loads((tmp_path / "about.json").read_text()) == ABOUT


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"[1]", b"3", b"", b"\xff{}", b'{"step": 3}', b'{"step": "3", "loss": 1.0}', b"[" * 100_000],
    ids=["no JSON", "a list", "a number", "an empty line", "no text", "a field missing", "a wrong type", "deep nesting"],
)
def test_a_line_that_is_no_entry_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "log"
    path.write_bytes(written(path) + line + b"\n" + b'{"step": 4, "loss": 2.0}\n')
    refused(path, "line 5 is not a JSON object with step, loss: b'", fields=FIELDS)


def test_a_first_line_that_is_no_object_is_named(tmp_path):
    (tmp_path / "log").write_bytes(b"not a log of ours\n")
    refused(tmp_path / "log", "line 1 is not a JSON object: b'not a log of ours")


def test_a_log_that_is_not_to_be_resumed_is_refused(tmp_path):
    path = tmp_path / "log"
    written(path, resume=False)
    refused(path, "holds an earlier run; --resume goes on with it", resume=False)
    refused(path, "holds an earlier run; --resume goes on with it", about={"weights": 8}, resume=False)
    path.write_bytes(b'{"weig')
    assert written(path, resume=False).count(b"\n") == 1 + len(ENTRIES)


# ---- files that appear whole or not at all


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with journal.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), journal.replacing(path) as file:
        file.write(b"ha")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
