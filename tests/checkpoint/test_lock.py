"""A run belongs to one process at a time."""

import subprocess
import sys

import pytest

from gshardx.checkpoint.lock import hold
from gshardx.errors import BadInput


def test_the_lock_creates_the_folder_and_is_held_by_one(tmp_path):
    run = tmp_path / "deep" / "run"
    with hold(run):
        assert run.is_dir()
        with pytest.raises(BadInput, match=r"deep/run: another process trains in it"):
            hold(run)
        with hold(tmp_path / "other"):
            pass  # another run is free
    with hold(run):
        pass  # and so is this one, once it is let go


def test_the_lock_keeps_out_another_process_until_its_holder_dies(tmp_path):
    run = tmp_path
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; held = open(sys.argv[1], 'w'); fcntl.flock(held, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
            str(run / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="another process trains in it"):
            hold(run)
    finally:
        holder.kill()
        holder.communicate()
    hold(run).close()


@pytest.mark.parametrize("place", ["file", "file/run", "n" * 300, "run"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"can't be written.*--run_dir") as caught:
        hold(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
