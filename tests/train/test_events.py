"""What happened in a run beside its steps."""

import json

from gshardx.train.events import Events


def test_each_event_is_a_line_that_is_there_at_once(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    events.tell("start", "from step 0", processes=2)
    events.step = 7
    events.tell("guard", "a loss that spikes")
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert 1.7e9 < first.pop("time") <= second.pop("time")
    assert first == {"step": 0, "event": "start", "text": "from step 0", "processes": 2}
    assert second == {"step": 7, "event": "guard", "text": "a loss that spikes"}


def test_a_later_start_appends_and_a_disk_that_refuses_it_ends_no_run(tmp_path):
    for number in range(2):
        Events(tmp_path / "events.jsonl").tell("start", f"{number}")
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 2
    Events(tmp_path / "gone" / "events.jsonl").tell("start", "")
    Events(None).tell("start", "")
