"""What is meant by a path, from wherever it is said."""

import pytest

from gshardx.checkpoint.manifest import NAME
from gshardx.checkpoint.places import find, folders, parse_place
from gshardx.errors import BadInput
from tests.checkpoint.trees import saved


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 2 and 4 are finished, 6 is not, the manifest of 8 is damaged."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    saved(folder / "checkpoints", (2, 4))
    (folder / "checkpoints" / "6").mkdir()
    (folder / "checkpoints" / "8").mkdir()
    (folder / "checkpoints" / "8" / NAME).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("here", "path"),
    [
        ("", "checkpoints/2"),
        ("", "checkpoints/2/"),
        ("", "./checkpoints/2"),
        ("checkpoints", "2"),
        ("checkpoints", "./2/"),
        ("checkpoints/2", "."),
        ("checkpoints/4", "../2"),
        ("..", "run/checkpoints/2"),
        ("..", "RUN/checkpoints/2"),
        ("..", "RUN/checkpoints/2/"),
        ("..", "RUN/checkpoints/../checkpoints/2"),
    ],
)
def test_a_step_is_named_by_its_folder_from_anywhere(run, monkeypatch, here, path):
    monkeypatch.chdir(run / here)
    found = find(path_of(run, path), None)
    assert found.step == 2
    assert found.run.resolve() == run
    assert found.folder.resolve() == run / "checkpoints" / "2"
    assert [one.resolve() for one in folders(path_of(run, path), None)] == [run / "checkpoints" / "2"]


def path_of(run, text):
    return type(run)(text.replace("RUN", str(run)))


@pytest.mark.parametrize(("here", "path"), [("", "."), ("..", "run"), ("..", "run/"), ("checkpoints", "..")])
def test_a_run_means_its_newest_finished_step(run, monkeypatch, here, path):
    monkeypatch.chdir(run / here)
    assert find(path_of(run, path), None).step == 4
    assert find(path_of(run, path), 2).step == 2
    assert [int(one.name) for one in folders(path_of(run, path), None)] == [2, 4, 6, 8]
    assert [int(one.name) for one in folders(path_of(run, path), 6)] == [6]


def test_a_run_that_is_called_like_a_step_is_a_run(tmp_path):
    run = tmp_path / "checkpoints" / "7"
    (run / "checkpoints").mkdir(parents=True)
    assert parse_place(run, None) == (run, None)


@pytest.mark.parametrize(
    ("step", "why"),
    [(3, "no such step; finished: 2, 4"), (6, "6: never finished"), (8, f"8: {NAME} is damaged; finished: 2, 4")],
)
def test_why_a_step_cant_be_had_is_told(run, step, why):
    with pytest.raises(BadInput, match=why):
        find(run, step)


def test_there_is_a_step_or_it_is_told(run, tmp_path):
    with pytest.raises(BadInput, match="checkpoints/3: no such step; there: 2, 4, 6, 8"):
        folders(run, 3)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BadInput, match="no such step; there: none"):
        folders(tmp_path, None)
