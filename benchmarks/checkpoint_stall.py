"""How long an asynchronous checkpoint keeps training waiting, beside the time of a save that is waited for."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from gshardx_train import config_of, random_rows
from shape import MIXTRAL, WARM_UP_STEPS, Shape

from gshardx.checkpoint.store import CheckpointStore, finished_steps
from gshardx.data.pipeline import TrainingRows
from gshardx.sharding import simulate_devices
from gshardx.train.job import Job
from gshardx.train.resume import items_of
from gshardx.train.state import TrainState, init_state

STALL_SHAPE = dataclasses.replace(MIXTRAL, expert_hidden=736, batch=2)
"""250 MB of parameters and moments; a small batch, so that steps are short and many fit beside one write."""
QUIET_STEPS = 6
"""Steps without a save before each step with one."""


@dataclasses.dataclass
class Run:
    """What a training loop holds: one state, its data iterator, its store and the step it is at."""

    job: Job
    state: TrainState
    rows: TrainingRows
    store: CheckpointStore
    step: int = 0

    @classmethod
    def start(cls, shape: Shape, folder: Path) -> "Run":
        config = config_of(shape, devices=1)
        job = Job.of(config, vocab=shape.vocab)
        state = init_state(job.blueprint, job.optimizer, config.seed, job.mesh)
        return cls(job, state, random_rows(shape), CheckpointStore(folder, every=1, keep=2))

    def advance(self) -> None:
        self.state, _ = self.job.train_step(self.state, self.job.to_device(next(self.rows)))
        jax.block_until_ready(self.state)
        self.step += 1

    def save(self) -> None:
        self.store.save(self.step, items_of(self.state, self.rows))

    def save_and_wait(self) -> None:
        self.save()
        self.store.wait()


class Round(NamedTuple):
    """Seconds of one asynchronous save and one that was waited for."""

    quiet: list[float]
    """Steps with no save in flight."""
    saving_step: float
    """A step and the call that starts a save after it."""
    call: float
    """That call alone."""
    beside: list[float]
    """The steps after it, until the save is finished."""
    blocking: float
    """A save and the wait for it, with no step under way."""


def seconds_of(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def one_round(run: Run) -> Round:
    quiet = [seconds_of(run.advance) for _ in range(QUIET_STEPS)]
    step = seconds_of(run.advance)
    call = seconds_of(run.save)
    saved, beside = run.step, []
    while saved not in finished_steps(run.store.folder):
        beside.append(seconds_of(run.advance))
    run.store.wait()
    run.advance()
    return Round(quiet, step + call, call, beside, seconds_of(run.save_and_wait))


def summary(rounds: list[Round]) -> dict[str, float]:
    """Medians over rounds; each round is held against its own quiet steps, so that a slow minute does not count."""
    quiet = [statistics.median(one.quiet) for one in rounds]
    stall = statistics.median(one.saving_step - normal for one, normal in zip(rounds, quiet, strict=True))
    later = [sum(one.beside) - len(one.beside) * normal for one, normal in zip(rounds, quiet, strict=True)]
    call = statistics.median(one.call for one in rounds)
    blocking = statistics.median(one.blocking for one in rounds)
    return {
        "median_step_seconds": statistics.median(quiet),
        "stall_seconds": stall,
        "save_call_seconds": call,
        "blocking_seconds": blocking,
        "stall_of_blocking": max(stall, call) / blocking,  # steps that vary can hide a part of the call
        "steps_beside_write": statistics.median(len(one.beside) for one in rounds),
        "later_delay_seconds": statistics.median(later),
    }


def measure(saves: int, shape: Shape = STALL_SHAPE) -> dict[str, Any]:
    """Save ``saves`` times each way on one device; call it before anything else uses JAX."""
    simulate_devices(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(shape, Path(folder))
        for _ in range(WARM_UP_STEPS):
            run.advance()
        run.save_and_wait()  # the first save of a process is slower
        rounds = [one_round(run) for _ in range(saves)]
        run.store.close()
    return {
        "framework": "gshardx",
        "state_bytes": sum(array.nbytes for array in jax.tree.leaves(run.state)),
        "saves": saves,
        **summary(rounds),
        "versions": [
            f"gshardx {version('gshardx')} on jax {jax.__version__}",
            f"orbax-checkpoint {version('orbax-checkpoint')}",
        ],
    }
