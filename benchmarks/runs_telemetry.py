"""What a run's bookkeeping adds to its steps: blocks of steps with all of it and without, in turns.

Every step is waited for, on both sides: what the loop hides behind the device is counted here as well.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from gshardx_train import config_of, random_rows
from shape import MIXTRAL, WARM_UP_STEPS

from gshardx.checkpoint.store import CheckpointStore
from gshardx.config import CheckpointConfig, GuardConfig, ProfileConfig, WatchdogConfig
from gshardx.data.prefetch import Ahead
from gshardx.sharding import simulate_devices
from gshardx.sharding.distributed import Largest
from gshardx.sharding.peers import Peers
from gshardx.sharding.startup import keep_memory
from gshardx.train.events import Events
from gshardx.train.goodput import BEAT, Goodput
from gshardx.train.guard import Guard
from gshardx.train.job import Job
from gshardx.train.meter import Meter
from gshardx.train.objective import Batch
from gshardx.train.profile import Profile
from gshardx.train.progress import Progress
from gshardx.train.run_dir import RunDir
from gshardx.train.saver import Saver, Wish
from gshardx.train.state import TrainState
from gshardx.train.step import StepMetrics
from gshardx.train.trackers import Trackers
from gshardx.train.watchdog import Watchdog

SHAPE = dataclasses.replace(MIXTRAL, batch=2)
BLOCK = 5
"""Steps in a row; few, so that what changes on a shared machine meets both ways."""
BEATS = 50
_NEVER = 10**9  # steps


@dataclasses.dataclass
class Trainer:
    """The step alone; ``inside``: seconds in it and in waiting for its batch so far, and this thread's CPU seconds."""

    job: Job
    state: TrainState
    rows: Ahead[Batch]
    inside: tuple[float, float] = (0.0, 0.0)

    def step(self) -> StepMetrics:
        start = clocks()
        batch = next(self.rows)
        self.state, metrics = self.job.train_step(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        wall, cpu = (now - then for now, then in zip(clocks(), start, strict=True))
        self.inside = self.inside[0] + wall, self.inside[1] + cpu
        return metrics


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


class Telemetry:
    """What :mod:`gshardx.train.stepping` does around a step where none is saved, evaluated or traced."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        run, config = RunDir(folder), trainer.job.config
        self._trainer, self._number = trainer, 0
        self.goodput, self._events = Goodput(run.goodput), Events(run.events)
        self.trackers = Trackers(run, config, first_step=1)
        self._store = CheckpointStore(run.checkpoints, every=_NEVER, keep=2)
        self._saver = Saver(CheckpointConfig(every=_NEVER, every_minutes=60), self._store, self.goodput, print)
        self._profile = Profile(ProfileConfig(), run.profile)
        self._agree = Largest(trainer.job.mesh)
        guard = Guard(GuardConfig(spike_factor=100), 0, print)
        self._meter = Meter(trainer.job, guard, self.trackers, Progress(_NEVER, 0), self.goodput, lambda line: None)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watchdog]:
        self.goodput.enter("step")
        with Watchdog(WatchdogConfig(), self.goodput, self._events, Peers()) as watchdog:
            yield watchdog

    def step(self, watchdog: Watchdog) -> None:
        self._number += 1
        self._events.step = self._number
        self._profile.before(self._number)
        with self.goodput.spending("data_wait"):
            pass  # Trainer.step takes the batch
        with jax.transfer_guard("disallow"):
            metrics = self._trainer.step()
        self._meter.put(
            self._number, metrics._replace(experts=None), {"data/skipped": float(self._trainer.rows.skipped)}
        )
        self._profile.after(self._number, self._trainer.state)
        wish = Wish(self._agree(Wish.of([], self._saver.due)))
        assert not self._saver.wants(self._number, {}, wish, last=False)
        self._saver.check()
        watchdog.step(self._number)

    def beat_seconds(self) -> float:
        """Of what the watchdog's thread does at each beat: the median."""
        watchdog, found = Watchdog(WatchdogConfig(), self.goodput, self._events, Peers()), []
        for number in range(BEATS):
            watchdog.step(number)
            start = time.perf_counter()
            self.goodput.write()
            watchdog.look()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def close(self) -> None:
        self._meter.flush()
        self.trackers.close()
        self._store.close()


def bare_block(trainer: Trainer) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(BLOCK):
        trainer.step()
    return (time.perf_counter() - start) / BLOCK


def whole_block(trainer: Trainer, telemetry: Telemetry) -> tuple[float, float, float]:
    """Seconds a step, those of them outside the step itself, and this thread's CPU seconds there."""
    with telemetry.watched() as watchdog:
        start, before = clocks(), trainer.inside
        for _ in range(BLOCK):
            telemetry.step(watchdog)
        (whole, cpu), (inside, inside_cpu) = (
            [b - a for a, b in zip(*pair, strict=True)] for pair in ((start, clocks()), (before, trainer.inside))
        )
    return whole / BLOCK, (whole - inside) / BLOCK, (cpu - inside_cpu) / BLOCK


def measure(rounds: int) -> dict[str, Any]:
    """``rounds`` blocks each way on one device; call it before anything else uses JAX."""
    keep_memory()  # as the command does
    simulate_devices(1)
    config = config_of(SHAPE, devices=1)
    job = Job.of(config, vocab=SHAPE.vocab)
    rows = Ahead(random_rows(SHAPE), job.to_device, config.data.prefetch)
    trainer = Trainer(job, job.init_state(), rows)
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(trainer, Path(folder))
        for _ in range(WARM_UP_STEPS):
            trainer.step()
        whole_block(trainer, telemetry)
        bare, whole = list[float](), list[tuple[float, float, float]]()
        for number in range(rounds):
            if number % 2:
                bare.append(bare_block(trainer))
            whole.append(whole_block(trainer, telemetry))
            if number % 2 == 0:
                bare.append(bare_block(trainer))
        beat = telemetry.beat_seconds()
        telemetry.close()
    rows.close()
    step = statistics.median(bare)
    _, call, cpu = (statistics.median(column) for column in zip(*whole, strict=True))
    return {
        "step_seconds": step,
        "calls_seconds": call,
        "calls_cpu_seconds": cpu,
        "beat_seconds": beat,
        "share": call / step + beat / BEAT,
        "ratios": [with_it[0] / without for with_it, without in zip(whole, bare, strict=True)],
        "trackers": ["metrics.jsonl", *config.tracking.trackers],
    }
