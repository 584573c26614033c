"""A long run of a tiny model: nothing grows, and only what is to be kept is kept."""

import os
import statistics
import time
from pathlib import Path

import pytest

from gshardx.checkpoint.store import finished_steps, step_folders
from tests.children import users_environment
from tests.train.processes import finish, lines_of, start_anew, start_training, write_inputs

STEPS = 10_000
SMALL = ["--model.layers", "1", "--model.moe.every", "1", "--optimizer.name", "lion"]
SMALL += ["--train.batch_size", "2", "--data.sequence_length", "16"]
"""Few arrays and short rows: a save is made of arrays, and what may grow with steps and saves does so with any."""


def resident(process):
    """Bytes of memory of the process's own: what files have in it may go at any time."""
    facts = Path(f"/proc/{process.pid}/status").read_text().split("\n")
    return sum(int(line.split()[1]) * 1024 for line in facts if line.startswith(("RssAnon:", "RssShmem:")))


def step_of(run):
    """By the last whole line, without reading the file."""
    with (run / "metrics.jsonl").open("rb") as lines:
        lines.seek(max(0, os.fstat(lines.fileno()).st_size - 20_000))
        last = lines.read().split(b"\n")[-2]
    return int(last.split(b'"step": ')[1].split(b",")[0])


@pytest.mark.sweep
def test_ten_thousand_steps_and_five_hundred_checkpoints_leave_memory_and_files_as_they_were(tmp_path):
    write_inputs(tmp_path)
    run, memory, files, seen = tmp_path / "run", {}, {}, 0
    process = start_training(
        tmp_path, run, "--mesh.data", "1", "--train.steps", str(STEPS), "--checkpoint.every", "20",
        "--checkpoint.keep_every", "4000", "--train.eval_every", "2500", "--optimizer.learning_rate", "1e-4",
        *SMALL, start=start_anew, env=users_environment(),
    )  # fmt: skip
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 20_000:
            step = step_of(run)
            if step >= seen + 20:
                seen = step
                memory[step] = resident(process)
                files[step] = len(os.listdir(f"/proc/{process.pid}/fd"))
        time.sleep(0.1)
    finish(process)

    def quarter(figures, number):
        here = [value for step, value in figures.items() if (number - 1) * STEPS // 4 < step <= number * STEPS // 4]
        assert len(here) > 10
        return here

    median = statistics.median
    assert median(quarter(memory, 4)) == pytest.approx(median(quarter(memory, 2)), rel=0.02)
    # The least of each: a save in flight has its files open, and how many of them is chance.
    assert min(quarter(files, 4)) <= min(quarter(files, 2))
    evaluated = [line for line in lines_of(run) if "evaluation/bits_per_byte" in line]
    best = min(evaluated, key=lambda line: line["evaluation/bits_per_byte"])["step"]
    assert [line["step"] for line in evaluated] == [2500, 5000, 7500, 10_000]
    assert set(step_folders(run / "checkpoints")) == {4000, 8000, 9960, 9980, 10_000, best}
    assert finished_steps(run / "checkpoints") == step_folders(run / "checkpoints")
