"""Real runs in real processes: killed, resumed, moved to other meshes, given bad input."""

import json
import random
import shutil
import signal
import time

import numpy as np
import pytest

from gshardx.checkpoint.store import finished_steps
from tests.checkpoint.good import newest_good_step
from tests.train.processes import (
    STEPS,
    content,
    finish,
    learning,
    lines_of,
    start,
    start_anew,
    start_training,
    write_inputs,
)

pytestmark = pytest.mark.slow  # real processes, each with its own start of JAX


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(place):
    run = place / "undisturbed"
    out, _ = finish(start_training(place, run, start=start_anew))
    assert "bits per byte" in out
    return run


def test_every_step_writes_its_line(undisturbed):
    lines = lines_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = ["learning/loss", "learning/aux_loss", "learning/grad_norm", "perf/step_seconds", "perf/tokens_per_second"]
    for name in [*names, "moe/drop_fraction", "moe/load_max_over_mean", "moe/layer_0/drop_fraction"]:
        assert all(isinstance(line[name], float) for line in lines), name
    assert lines[-1]["evaluation/bits_per_byte"] > 0
    assert lines[-1]["learning/loss"] < lines[0]["learning/loss"] - 1
    assert any((undisturbed / "tensorboard").iterdir())


def test_the_kept_checkpoints_are_the_newest(undisturbed):
    assert finished_steps(undisturbed / "checkpoints") == [STEPS - 8, STEPS - 4, STEPS]


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.sweep)])
def test_killed_again_and_again_it_ends_bit_for_bit_where_it_would_have(place, undisturbed, times):
    """SIGKILL at random moments, some of them while a checkpoint is being written."""
    run, draw, during_save, kills = place / f"killed-{times}", random.Random(1), 0, 0
    while kills < times:
        process = start_training(place, run)
        if kills % 2:  # when a save is under way: a step folder that has no manifest yet
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                folders = list((run / "checkpoints").glob("[0-9]*")) if (run / "checkpoints").is_dir() else []
                if any(not (folder / "manifest.json").exists() for folder in folders):
                    during_save += 1
                    break
                time.sleep(0.002)
        else:
            time.sleep(draw.uniform(1.0, 8.0))
        if process.poll() is not None:  # it finished: the rest of the kills have nothing to hit
            finish(process)
            assert finished_steps(run / "checkpoints")[-1] == STEPS
            shutil.rmtree(run / "checkpoints" / str(STEPS))
            shutil.rmtree(run / "checkpoints" / str(STEPS - 4), ignore_errors=True)
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    finish(start_training(place, run))
    assert during_save >= times / 7
    assert learning(run) == learning(undisturbed)
    assert content(run, STEPS) == content(undisturbed, STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.sweep)])
def test_a_signal_saves_and_the_same_command_continues(place, undisturbed, number):
    run = place / f"signal-{number}"
    process = start_training(place, run)
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = finish(process, expected=128 + number, limit=30)  # seconds: what a preempted machine has
    assert "saved step" in out
    assert "Traceback" not in err
    step = newest_good_step(run / "checkpoints", report=pytest.fail)
    assert step == lines_of(run)[-1]["step"]
    out, _ = finish(start_training(place, run))
    assert f"from step {step}" in out
    assert learning(run) == learning(undisturbed)
    assert content(run, STEPS) == content(undisturbed, STEPS)


@pytest.mark.parametrize(
    "shape",
    [(2, 4), pytest.param((4, 2), marks=pytest.mark.sweep), pytest.param((1, 1), marks=pytest.mark.sweep)],
    ids=str,
)
def test_a_run_moves_to_another_mesh(place, undisturbed, shape):
    run = place / f"moved-{shape[0]}x{shape[1]}"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    mesh = ["--mesh.data", str(shape[0]), "--mesh.expert", str(shape[1])]
    out, _ = finish(start_training(place, run, *mesh))
    assert f"from step {STEPS - 4}" in out
    assert "changed since the last start: mesh." in out
    there, here = lines_of(run), lines_of(undisturbed)
    assert [line["step"] for line in there] == [line["step"] for line in here]
    for name in ("learning/loss", "learning/aux_loss", "learning/grad_norm"):
        np.testing.assert_allclose([line[name] for line in there], [line[name] for line in here], rtol=1e-5)


def test_a_damaged_checkpoint_is_named_set_aside_and_the_older_one_used(place, undisturbed):
    run = place / "damaged"
    shutil.copytree(undisturbed, run)
    last = run / "checkpoints" / str(STEPS)
    chunk = max((last / "params").rglob("0"), key=lambda p: p.is_file() and p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 16
    chunk.write_bytes(bytes(data))
    out, _ = finish(start_training(place, run))
    array = chunk.relative_to(last).parts[1]
    file = chunk.relative_to(last)
    assert f"checkpoints/{STEPS}: params/{array} is damaged ({file}: checksum differs)" in out
    assert f"from step {STEPS - 4}" in out
    assert (run / "damaged" / str(STEPS)).is_dir()
    assert learning(run) == learning(undisturbed)
    assert content(run, STEPS) == content(undisturbed, STEPS)


def test_a_finished_run_says_so_and_more_steps_continue_it(place, undisturbed):
    run = place / "longer"
    shutil.copytree(undisturbed, run)
    out, _ = finish(start_training(place, run))
    assert f"has reached step {STEPS} of {STEPS}" in out
    out, _ = finish(start_training(place, run, "--train.steps", str(STEPS + 3)))
    assert f"changed since the last start: train.steps: {STEPS} -> {STEPS + 3}" in out
    assert [line["step"] for line in lines_of(run)] == list(range(1, STEPS + 4))


def test_generation_streams_from_a_run_and_a_batch_changes_nothing(place, undisturbed):
    def texts(*more):
        options = ["--run", str(undisturbed), "--max_new_tokens", "12", "--seed", "3"]
        return finish(start(place, "generate", *options, *more, module="gshardx.infer"))[0]

    alone = texts("--prompt", "to be")
    assert alone.startswith("to be")
    assert len(alone) > len("to be\n")
    (place / "prompts.txt").write_text("question\nto be\n")
    together = texts("--prompt_file", str(place / "prompts.txt"))
    assert together == texts("--prompt", "question") + "\n" + alone + "\n"
    assert texts("--prompt", "question", "--prompt", "to be", "--mesh.expert", "4") == together


def test_a_batch_that_was_killed_goes_on_where_it_was(place, undisturbed):
    """SIGKILL between two answers; the same command then gives, byte for byte, what an undisturbed one gives."""
    prompts = [{"prompt": text, "n": 1 + number % 2} for number, text in enumerate(["to be", "or", "not"] * 8)]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))

    def answer(output):
        options = ["--run", str(undisturbed), "--max_new_tokens", "20", "--batch_size", "2"]
        return start(place, "batch", "in.jsonl", output, *options, module="gshardx.infer")

    finish(answer("whole.jsonl"))
    killed, output = answer("killed.jsonl"), place / "killed.jsonl"
    while not (output.exists() and output.read_bytes().count(b"\n") >= 5):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.kill()
    killed.communicate()
    before = output.read_bytes()
    assert before.count(b"\n") < len(prompts)
    said, _ = finish(answer("killed.jsonl"))
    assert f"{len(prompts) - before.count(chr(10).encode())} answers" in said
    assert output.read_bytes() == (place / "whole.jsonl").read_bytes()
