"""TensorBoard's event files."""

from types import SimpleNamespace

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboardX.proto.event_pb2 import SessionLog

from gshardx.train.trackers.tensorboard import Board


def events_in(file):
    """What TensorBoard reads, checksums held."""
    return list(LegacyEventFileLoader(str(file)).Load())


def test_it_is_told_which_steps_a_resumed_run_repeats(tmp_path, monkeypatch):
    for start, (first, last) in enumerate([(1, 6), (4, 5)]):
        clock = SimpleNamespace(time=lambda start=start: 1_000_000_000.0 + start)  # part of the file's name
        monkeypatch.setattr("gshardx.train.trackers.tensorboard.time", clock)
        board = Board(tmp_path / "tensorboard", first)
        for step in range(first, last + 1):
            board.write(step, {"learning/loss": first})
        board.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    for file, (first, last) in zip(files, [(1, 6), (4, 5)], strict=True):
        version, started, *steps = events_in(file)
        assert version.file_version == "brain.Event:2"  # or TensorBoard forgets nothing
        assert (started.session_log.status, started.step) == (SessionLog.START, first)
        assert [event.step for event in steps] == list(range(first, last + 1))
        assert {(v.tag, v.simple_value) for event in steps for v in event.summary.value} == {("learning/loss", first)}


def test_a_step_is_in_the_file_at_once(tmp_path):
    board = Board(tmp_path / "tensorboard", 1)
    board.write(1, {"learning/loss": 2.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in events_in(file)][-1] == 1
    board.close()
