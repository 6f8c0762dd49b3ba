"""A command ends with one line: at an error, on a full disk, and in seconds after Ctrl-C and SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from checkpoints_convert import convert
from checkpoints_convert.ending import GRACE_SECONDS, DiskFull, end_well, one_line, unfinished, writing
from experiments.common.report import Output
from tests.checkpoints_convert import files
from tests.support.full_disk import no_file_above
from tests.support.tiny_models import CASES

# Signals, to a process of its own.

PROGRAM = """
import ctypes, os, pathlib, signal, sys, threading, time
import jax
from checkpoints_convert import convert
from checkpoints_convert.ending import end_well, unfinished

jax.config.update("jax_platforms", "cpu")  # others log what they miss
in_c = ctypes.CDLL(None).sleep  # goes on at a signal, as a compilation does

def ready():
    print("ready", flush=True)

def work():
    {work}

end_well(work, "interrupted; try again")
print("done", flush=True)
"""
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def started(work, tmp_path):
    program = PROGRAM.format(work=work.replace("\n", "\n    "))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=files.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def ended(process, number, again=0):
    """stdout, stderr and the seconds until the process had ended."""
    began = time.monotonic()
    process.send_signal(number)
    for _ in range(again):
        time.sleep(0.2)
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return out, err, time.monotonic() - began


@SIGNALS
@pytest.mark.parametrize("where", ["Python", "C", "a callback that passes over it", "a library that makes another error of it"])
def test_a_signal_ends_a_command_in_seconds_with_one_line(tmp_path, number, where):
    work = {
        "Python": "ready()\nwhile True: time.sleep(0.01)",
        "C": "threading.Timer(0, ready).start()\nin_c(60)",
        "a callback that passes over it": "ready()\nwhile True:\n    try: time.sleep(0.01)\n    except KeyboardInterrupt: pass",
        "a library that makes another error of it": (
            "ready()\nwhile True:\n    try: time.sleep(0.01)\n    except KeyboardInterrupt: raise RuntimeError('lock')"
        ),
    }[where]
    path = tmp_path / "half"
    path.mkdir()
    (path / "file").write_text("made so far")
    with_a_file = "with unfinished(pathlib.Path(sys.argv[1]) / 'half'):\n    " + work.replace("\n", "\n    ")
    process = started(with_a_file, tmp_path)
    out, err, seconds = ended(process, number, again=where == "Python")
    assert process.returncode == 128 + number and err == "interrupted; try again\n" and out == ""
    assert seconds < GRACE_SECONDS + 5 and not path.exists()


def test_exit_0_is_for_work_that_is_done(tmp_path):
    """A signal that came too late, or was passed over, while the work was finished."""
    process = started("try:\n    ready()\n    time.sleep(60)\nexcept KeyboardInterrupt: pass", tmp_path)
    out, err, _ = ended(process, signal.SIGTERM)
    assert (process.returncode, out, err) == (0, "done\n", "")


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_a_conversion_that_is_ended_leaves_nothing(tmp_path, source, format):
    at_half = "(done > total / 2) and (ready(), time.sleep(60))"
    work = f"convert({str(source)!r}, sys.argv[1] + '/out', format={format!r}, progress=lambda done, total: {at_half})"
    process = started(work, tmp_path)
    _, err, seconds = ended(process, signal.SIGTERM)
    assert process.returncode == 143 and err == "interrupted; try again\n" and seconds < GRACE_SECONDS + 5
    assert not list(tmp_path.iterdir())


@SIGNALS
def test_a_conversion_that_is_ended_while_it_imports_says_so_in_one_line(tmp_path, source, number):
    command = [sys.executable, "-m", "checkpoints_convert", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=files.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)  # it imports for seconds
    out, err, seconds = ended(process, number)
    assert process.returncode == 128 + number and re.fullmatch("interrupted(; nothing was written)?\n", err) and out == ""
    assert seconds < GRACE_SECONDS and not list(tmp_path.iterdir())


def test_what_was_in_force_before_is_in_force_again():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
    end_well(lambda: None, "interrupted")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


# Errors.


def test_an_error_is_one_line_and_exit_1(capsys):
    def fail():
        raise ValueError("config.json: bad\n\x1b[31m")

    with pytest.raises(SystemExit) as caught:
        end_well(fail, "interrupted")
    assert caught.value.code == 1 and capsys.readouterr().err == "error: config.json: bad\\n\\x1b[31m\n"


def test_a_fault_of_the_program_stays_one():
    assert one_line(RuntimeError("internal")) is None and one_line(KeyError("x")) is None
    with pytest.raises(KeyError):
        end_well(lambda: {}["x"], "interrupted")


def test_out_of_memory_says_how_much_and_what_makes_it_smaller():
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jnp.zeros(2**46, jnp.float32).block_until_ready()
    line = one_line(caught.value, "--batch_size or --context")
    assert line.startswith("out of memory: ") and "281474976710656" in line
    assert line.endswith("; --batch_size or --context makes it smaller")
    assert one_line(MemoryError()) == "out of memory: how much was wanted is not known"
    assert one_line(MemoryError("Unable to allocate 5.00 TiB")) == "out of memory: Unable to allocate 5.00 TiB"


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda,tpu"}
    command = [sys.executable, "-m", "experiments.run", f"--output_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS=cuda,tpu: there is no such device here")
    assert "Traceback" not in done.stderr


def test_a_conversion_needs_no_accelerator(tmp_path, source):
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "checkpoints_convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out").is_dir()


# A full disk, for which files that may not grow stand: what writes them gets the same kind of error.


@pytest.mark.parametrize(("format", "file"), [("safetensors", r"model\.safetensors"), ("orbax", r"moe\.\w+|embedding|\w+")])
def test_a_full_disk_is_named_with_the_file_and_what_it_wanted(tmp_path, source, format, file):
    with no_file_above(4000), pytest.raises(DiskFull, match=rf"out\.\w+\.partial/(.*/)?({file}).*: .*it takes [\d,]+ bytes"):
        convert(source, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_a_companion_on_a_full_disk_is_named_too(tmp_path):
    case = CASES["glm-mixed"]
    source = files.write_checkpoint(tmp_path / "in", files.config_fields(case), case.state)
    (source / "vocab.json").write_bytes(b" " * 10**7)
    with (
        no_file_above(5 * 10**6),
        pytest.raises(DiskFull, match=r"out\.\w+\.partial/vocab\.json: .*; it takes 10,000,000 bytes"),
    ):
        convert(source, tmp_path / "out", format="safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_who_comes_second_to_a_name_is_refused(tmp_path, source):
    """Two conversions into one directory: the first that ends has it."""

    def meanwhile(done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("whole")

    with pytest.raises(ValueError, match=r"out: was made by someone else meanwhile"):
        convert(source, tmp_path / "out", progress=meanwhile)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, source, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.stat_result((0,) * 10) and type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"the weights take [\d,]+ bytes, 1,000 are free on that disk"):
        convert(source, tmp_path / "out", format="safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.0", ".zarray"])
def test_what_orbax_did_not_write_is_missed(tmp_path, source, monkeypatch, name):
    """A library may pass over an error of the disk."""
    from checkpoints_convert import orbax_io

    real = orbax_io._save

    def one_file_less(path, tree):
        real(path, tree)
        (path / "embedding" / name).unlink()

    monkeypatch.setattr(orbax_io, "_save", one_file_less)
    with pytest.raises(OSError, match=r"params/embedding: was not written whole"):
        convert(source, tmp_path / "out", format="orbax")
    assert not list(tmp_path.iterdir())


def test_a_report_on_a_full_disk_is_an_error_that_names_it(tmp_path):
    output = Output.create(str(tmp_path))
    output.write("report.md", "before")
    with no_file_above(100), pytest.raises(DiskFull, match=r"report\.md: file too large"):
        output.write("report.md", "x" * 100_000)
    assert (tmp_path / "report.md").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_errors_of_libraries_about_a_full_disk_are_ones_too(tmp_path):
    message = r"a: No space left on device; it takes 1,234 bytes, [\d,]+ are free"
    with pytest.raises(DiskFull, match=message), writing(tmp_path / "a", 1234):
        raise RuntimeError("RESOURCE_EXHAUSTED: Failed to write 7 bytes: No space left on device [os_error_code='28']")
    with pytest.raises(RuntimeError, match="other"), writing(tmp_path / "a", 1234):
        raise RuntimeError("other")
    assert one_line(RuntimeError("RESOURCE_EXHAUSTED: No space left on device")).startswith("RESOURCE_EXHAUSTED: No space")


def test_what_is_unfinished_is_removed_at_any_error(tmp_path):
    with pytest.raises(KeyError), unfinished(tmp_path / "file") as path:
        path.write_text("half")
        raise KeyError
    with unfinished(tmp_path / "kept") as path:
        path.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
