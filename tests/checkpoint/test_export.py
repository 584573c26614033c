"""An export is there as a whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from gshardx.checkpoint.export import export
from gshardx.checkpoint.places import find
from gshardx.errors import BadInput
from gshardx.lock import hold
from tests.checkpoint.trees import saved as saved_tree


@pytest.fixture
def saved(tmp_path):
    saved_tree(tmp_path / "run" / "checkpoints", (2,))
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    return find(tmp_path / "run", 2)


KILLED = """
import os, signal, sys, pathlib
from gshardx.checkpoint import export
from gshardx.checkpoint.places import find
export.convert = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export.export(find(pathlib.Path(sys.argv[1]), None), pathlib.Path(sys.argv[2]), ("params",), "bfloat16")
"""


@pytest.mark.slow
def test_what_a_killed_export_left_is_replaced(saved, tmp_path):
    target = tmp_path / "weights"
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved.run), str(target)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / ".weights.part" / "run" / "config.yaml").exists()
    (saved.run / "config.yaml").unlink()
    export(saved, target, ("params",), None)
    assert sorted(os.listdir(tmp_path)) == ["run", "weights"]
    assert os.listdir(target) == ["checkpoints"], "nothing of the killed one"
    assert find(target, None).step == 2


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (BadInput("params/w: can't be read"), BadInput, "params/w: can't be read"),
        (OSError(28, "No space left on device"), BadInput, r"weights: can't be written \(No space left on device\)"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(saved, tmp_path, monkeypatch, error, raised, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("gshardx.checkpoint.export.convert", fail)
    with pytest.raises(raised, match=said):
        export(saved, tmp_path / "weights", ("params",), "bfloat16")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("place", ["there", "deep/new/"])
def test_an_empty_directory_is_taken_and_folders_on_the_way_are_made(saved, tmp_path, monkeypatch, place):
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("there" if place == "." else ""))
    target = tmp_path / "here" / ("there" if place == "." else place)
    export(saved, type(target)(place), ("params", "rng"), None)
    assert find(target, None).items == ["params", "rng"]


def test_a_second_export_to_the_same_place_is_told(saved, tmp_path):
    with hold(tmp_path / ".weights.part", "OUT_DIR", "exports to it"):
        with pytest.raises(BadInput, match="another process exports to it"):
            export(saved, tmp_path / "weights", ("params",), None)
        assert (tmp_path / ".weights.part").exists(), "it is the other's"
