"""A directory belongs to one process at a time."""

import subprocess
import sys

import pytest

from gshardx.errors import BadInput
from gshardx.lock import hold


def held(folder):
    return hold(folder, "--out", "writes it")


def test_the_lock_creates_the_folder_and_is_held_by_one(tmp_path):
    folder = tmp_path / "deep" / "out"
    with held(folder):
        assert folder.is_dir()
        with pytest.raises(BadInput, match=r"^--out .*deep/out: another process writes it; wait for it or use another"):
            held(folder)
        with held(tmp_path / "other"):
            pass  # another one is free
    with held(folder):
        pass  # and so is this one, once it is let go


def test_the_lock_keeps_out_another_process_until_its_holder_dies(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; held = open(sys.argv[1], 'w'); fcntl.flock(held, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="another process writes it"):
            held(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    held(tmp_path).close()


@pytest.mark.parametrize("place", ["file", "file/out", "n" * 300, "out"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"can't be written.*choose another --out") as caught:
        held(tmp_path / place)
    assert str(tmp_path / place) in str(caught.value)
