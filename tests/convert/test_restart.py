"""A conversion that was killed goes on from what is whole, and ends in the same bytes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gshardx.checkpoint.beside import Part
from gshardx.checkpoint.manifest import damage
from gshardx.checkpoint.places import find
from gshardx.convert.__main__ import main
from gshardx.errors import BadInput
from tests.convert.test_public import PUBLIC

KILLED = """
import os, signal, sys
from gshardx.checkpoint import arrays
from gshardx.checkpoint.beside import Part
from gshardx.convert.__main__ import main

left, arrays._HELD = int(sys.argv[1]), 0

def finished(part, path, does=Part.finished):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    does(part, path)

Part.finished = finished
main(sys.argv[2:])
"""
"""With a number of files that are finished before it dies; one more is written by then, and not known to be."""
SHARDS = ["--shard_size", "0.000003"]


def run_killed(folder, files, *command):
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(files), *command], cwd=folder, capture_output=True, timeout=300
    ).returncode
    assert code == -signal.SIGKILL


def contents(folder):
    """Of all files but those that Orbax writes the time or the place into, and their checksums."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bound = ("METADATA", "commit_success.txt", "manifest.json")
    return {name: text for name, text in found.items() if not name.endswith(bound)}


def finished(place):
    """Files in the journal of a part, and when each was written."""
    names = [line.split(" ", 1)[1] for line in (place / "journal").read_text().splitlines()[1:]]
    return {name: (place / "run" / name).stat().st_mtime_ns for name in names}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Undisturbed: ``made`` from ``theirs``; and ``back`` from it, in several files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(PUBLIC / "mixtral", folder / "theirs", ignore=shutil.ignore_patterns("*.npz"))
    before = Path.cwd()
    os.chdir(folder)  # a run's config has its path
    try:
        assert main(["--from", "theirs", "--to", "made"]) == 0
        assert main(["--from", "made", "--to", "back", *SHARDS]) == 0
    finally:
        os.chdir(before)
    assert len(list((folder / "back").glob("*.safetensors"))) > 4
    return folder


WAYS = {"in": ("theirs", "made", []), "out": ("made", "back", SHARDS)}


def copied(way, run, folder, monkeypatch):
    """The command, to be run in a folder with nothing but its source."""
    source, target, options = WAYS[way]
    shutil.copytree(run / source, folder / source)
    monkeypatch.chdir(folder)
    return source, target, ["--from", source, "--to", target, *options]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_again_and_again_it_ends_in_the_same_bytes(way, run, tmp_path, monkeypatch):
    source, target, command = copied(way, run, tmp_path, monkeypatch)
    known = {}
    for files in (20, 9) if way == "in" else (1, 2):
        run_killed(tmp_path, files, *command)
        now = finished(tmp_path / f".{target}.part")
        assert len(now) == len(known) + files
        assert known.items() <= now.items(), "what was whole is not written again"
        known = now
    assert main(command) == 0
    assert contents(tmp_path / target) == contents(run / target)
    assert {name: (tmp_path / target / name).stat().st_mtime_ns for name in known} == known
    assert sorted(os.listdir(tmp_path)) == sorted([source, target])
    if way == "in":
        saved = find(tmp_path / target, None)
        assert damage(saved.folder, saved.manifest.checksum, saved.manifest.files) is None


def interrupted(command, files, monkeypatch):
    """Run it until it has finished some files."""

    def stop(part, path, does=Part.finished):
        if len(part._finished) == files:
            raise KeyboardInterrupt
        does(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "finished", stop)
        with pytest.raises(KeyboardInterrupt):
            main(command)


@pytest.mark.parametrize("change", ["file", "option"])
@pytest.mark.parametrize("way", WAYS)
def test_of_another_source_or_with_other_options_nothing_is_gone_on_with(way, change, run, tmp_path, monkeypatch):
    source, target, command = copied(way, run, tmp_path, monkeypatch)
    interrupted(command, 3, monkeypatch)
    before = finished(tmp_path / f".{target}.part")
    assert len(before) == 3
    if change == "file":
        os.utime(tmp_path / source / ("model-00001-of-00003.safetensors" if way == "in" else "config.yaml"), (1, 1))
    elif way == "in":
        command += ["--dtype", "bfloat16"]
    else:
        command[command.index("--shard_size") + 1] = "0.000004"
    assert main(command) == 0
    written = {name: path.stat().st_mtime_ns for name in before if (path := tmp_path / target / name).exists()}
    assert not written.items() & before.items()
    assert os.listdir(tmp_path / target) != []


@pytest.mark.slow
def test_what_was_finished_before_the_disk_was_full_stays(run, tmp_path, monkeypatch):
    """A limit on the bytes of a file stands for it."""
    _, target, command = copied("out", run, tmp_path, monkeypatch)
    sizes = [path.stat().st_size for path in sorted((run / "back").glob("*.safetensors"))]
    largest = sizes.index(max(sizes))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, hard))
    try:
        with pytest.raises(BadInput, match=r"can't be written .*what is whole stays, and the same command goes on"):
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(finished(tmp_path / f".{target}.part")) == largest > 0
    assert main(command) == 0
    assert contents(tmp_path / target) == contents(run / target)
