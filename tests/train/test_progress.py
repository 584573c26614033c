"""What a run says as it goes."""

from gshardx.train import progress
from gshardx.train.progress import PLAIN_LINE_SECONDS, Progress

SCALARS = {
    "learning/loss": 2.5,
    "perf/tokens_per_second": 50.0,
    "perf/mfu": 0.4,
    "moe/drop_fraction": 0.25,
    "moe/load_max_over_mean": 2.0,
}


def test_without_a_terminal_it_is_a_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(40, 0) as shown:
        for step in range(1, 41):
            now[0] += PLAIN_LINE_SECONDS / 10
            shown.show(step, SCALARS)
        shown.say("a word")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    parts = ("loss 2.500", "50 tokens/s", "MFU 40%", "dropped 25.0%", "load max/mean 2.00")
    assert all(part in lines[0] for part in parts)
    assert lines[-1] == "a word"


def test_evaluations_on_the_way_are_said_and_the_last_one_is_left_to_the_report(capsys):
    with Progress(40, 0) as shown:
        shown.show(39, SCALARS | {"evaluation/bits_per_byte": 3.25})
        shown.show(40, SCALARS | {"evaluation/bits_per_byte": 1.5})
    out = capsys.readouterr().out
    assert "step 39: 3.250 bits per byte" in out
    assert "1.500" not in out


def test_processes_other_than_the_first_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    with Progress(40, 0) as shown:
        shown.show(40, SCALARS)
        shown.say("a word")
    assert capsys.readouterr().out == ""
