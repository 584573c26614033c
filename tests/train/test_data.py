"""Training from tokenised folders in real processes: killed and moved to other numbers of processes and workers."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from gshardx.checkpoint.store import finished_steps
from tests.together import finish_both, start_both
from tests.train.processes import STEPS, finish, start, start_anew, start_training, write_inputs

pytestmark = pytest.mark.slow  # real processes, each with its own start of JAX

FLAGS = ["--data.path", "tokens", "--data.packing", "concatenate", "--train.steps", str(STEPS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("data"))
    flags = ["--path", "text.jsonl", "--out", "tokens", "--tokenizer", "bytes", "--shard_tokens", "4000"]
    out, _ = finish(start(folder, "tokenize", *flags, module="gshardx.data"))
    assert out.startswith("tokens: 60 documents, ")
    assert out.endswith(" shard(s); train with --data.path tokens\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(place):
    finish(start_training(place, place / "undisturbed", *FLAGS, start=start_anew))
    return place / "undisturbed"


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["learning/loss"] for line in lines]


def position(run, step):
    return json.loads((run / "checkpoints" / str(step) / "data" / "process_0-of-1.json").read_text())


def test_a_checkpoint_holds_the_place_after_the_batch_that_was_trained_on(undisturbed):
    """Not after those that were made ahead: a batch has 8 rows."""
    place = position(undisturbed, STEPS)
    assert place.keys() == {"epoch", "block", "row"}
    assert place["epoch"] == 0 or place["row"] < STEPS * 8
    if place["epoch"] == 0:
        assert place["row"] == STEPS * 8


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="thread"),
        pytest.param(["--data.workers", "2", "--data.prefetch", "5"], id="workers", marks=pytest.mark.sweep),
    ],
)
def test_killed_again_and_again_it_learns_what_it_would_have(place, undisturbed, more):
    run, draw, kills = place / f"killed-{len(more)}", random.Random(4), 0
    while True:
        process = start_training(place, run, *FLAGS, *more)
        done = finished_steps(run / "checkpoints")[-1:] if run.exists() else []
        stop = (done[0] if done else 0) + 4 * draw.randrange(1, 4)
        while process.poll() is None and not any(step >= stop for step in steps_of(run)):
            time.sleep(0.02)
        if process.poll() is not None:
            finish(process)
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 2
    assert losses(run) == losses(undisturbed)
    assert position(run, STEPS) == position(undisturbed, STEPS)


def steps_of(run):
    return finished_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else []


def test_two_processes_read_their_shares_and_one_goes_on_with_what_they_left(place, undisturbed):
    run = place / "both"
    arguments = ["-m", "gshardx.train", "--config", "tiny.yaml", "--run_dir", str(run), *FLAGS]
    finish_both(start_both(place, *arguments))
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-4)
    assert position(run, STEPS) == position(undisturbed, STEPS)
    for step in finished_steps(run / "checkpoints")[1:]:
        shutil.rmtree(run / "checkpoints" / str(step))
    out, _ = finish(start_training(place, run, *FLAGS))
    assert "resuming" in out
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-4)
    assert position(run, STEPS) == position(undisturbed, STEPS)


def test_a_damaged_record_ends_a_run_with_one_line_and_is_passed_over_if_asked(place):
    shutil.copytree(place / "tokens", place / "damaged")
    file = place / "damaged" / "00001.arrayrecord"
    data = bytearray(file.read_bytes())
    for at in range(500, 3000, 500):  # records of this text lie in the first 4,000 bytes
        data[at] ^= 255
    file.write_bytes(data)
    flags = [*FLAGS, "--data.path", "damaged"]
    process = start_training(place, place / "harmed", *flags)
    _, err = finish(process, expected=2)
    assert err.startswith("error: damaged/00001.arrayrecord, record ")
    assert err.count("\n") == 1
    assert "data.on_error = skip" in err
    out, _ = finish(start_training(place, place / "harmed", *flags, "--data.on_error", "skip"))
    assert "data: skipped " in out
    told = int(re.search(r"data: skipped (\d+) broken record\(s\) while training", out).group(1))
    last = json.loads((place / "harmed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["data/skipped"] <= told
