"""Two runs do not write into one folder."""

import subprocess
import sys

import pytest

from experiments.common.lock import hold
from experiments.common.report import Output

HOLD = "import pathlib, sys; from experiments.common.lock import Lock; held = Lock(pathlib.Path(sys.argv[1])); "


def another_process(directory, then):
    """A process that holds the folder once its first line is read."""
    program = [sys.executable, "-c", HOLD + "print('held', flush=True); " + then, str(directory)]
    started = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "held\n"
    return started


def test_the_second_run_is_refused_until_the_first_ends(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    other = another_process(directory, "sys.stdin.read()")
    with pytest.raises(ValueError, match=r"--output_dir=.*out: another run writes there"):
        Output.create(str(directory))
    other.kill()  # as a kill ends it, nothing being tidied up
    other.communicate()
    assert Output.create(str(directory)).directory == directory
    assert not list(directory.iterdir())


def test_a_process_may_hold_a_folder_several_times_and_lets_go_of_it(tmp_path):
    first, second = hold(tmp_path), hold(tmp_path)
    assert first is second
    del first, second
    other = another_process(tmp_path, "pass")
    other.communicate()
    assert other.returncode == 0


def test_what_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir=.*file/out: cannot be made"):
        Output.create(str(tmp_path / "file" / "out"))
