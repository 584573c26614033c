"""How long an asynchronous checkpoint keeps training waiting, beside the time of a save that is waited for."""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from gshardx_train import config_of
from shape import SHAPE, WARM_UP_STEPS, Shape

from gshardx.checkpoint.store import CheckpointStore, finished_steps
from gshardx.data.pipeline import Rows, training_rows
from gshardx.sharding import simulate_devices
from gshardx.train.job import Job
from gshardx.train.resume import items_of
from gshardx.train.state import TrainState, init_state

STALL_SHAPE = dataclasses.replace(SHAPE, expert_hidden=736, batch=2)
"""250 MB of parameters and moments; a small batch, so that steps are short and many fit beside one write."""
QUIET_STEPS = 4
"""Steps without a save before each step with one."""


class Training:
    """A run that saves when told to: one state, its data iterator and its store."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        config = config_of(shape, devices=1)
        self.job = Job.of(config, vocab=shape.vocab)
        self.state: TrainState = init_state(self.job.blueprint, self.job.optimizer, config.seed, self.job.mesh)
        self.rows = _random_pieces(shape)
        self.folder = folder
        self.store = CheckpointStore(folder, every=1, keep=2)
        self.step = 0

    def train_step(self) -> None:
        self.state, _ = self.job.train_step(self.state, self.job.to_device(next(self.rows)))
        jax.block_until_ready(self.state)
        self.step += 1

    def start_save(self) -> None:
        self.store.save(self.step, items_of(self.state, self.rows), force=True)

    def finish_save(self) -> None:
        self.store.wait()

    @property
    def writing(self) -> bool:
        return self.step > 0 and self._saved not in finished_steps(self.folder)

    def timed_save(self) -> tuple[float, float]:
        """Seconds of a step that starts a save, and of the call that starts it."""
        step = seconds_of(self.train_step)
        call = seconds_of(self.start_save)
        self._saved = self.step
        return step + call, call

    def steps_while_writing(self) -> list[float]:
        """Durations of the steps that begin before the save in flight is finished."""
        seconds = []
        while self.writing:
            seconds.append(seconds_of(self.train_step))
        return seconds


def _random_pieces(shape: Shape) -> grain.DatasetIterator[Rows]:
    pieces = np.random.default_rng(0).integers(shape.vocab, size=(64, shape.sequence + 1), dtype=np.int32)
    return training_rows(list(pieces), shape.sequence, shape.batch, seed=0)


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
