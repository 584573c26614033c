"""From a step's metrics on the devices to a line in the run's files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gshardx.train.flops import forward_flops_per_token, peak_flops
from gshardx.train.goodput import Goodput, scalars_of
from gshardx.train.guard import Guard
from gshardx.train.job import Job
from gshardx.train.metrics import Scalars, step_scalars
from gshardx.train.progress import Progress
from gshardx.train.schedules import schedule
from gshardx.train.step import StepMetrics
from gshardx.train.trackers import Trackers


class _Pending(NamedTuple):
    step: int
    metrics: StepMetrics
    beside: Scalars


class Meter:
    """Fetches each step's metrics when the next step is under way, so that logging never keeps the device waiting."""

    def __init__(
        self,
        job: Job,
        guard: Guard,
        trackers: Trackers,
        progress: Progress,
        goodput: Goodput,
        say: Callable[[str], None],
    ) -> None:
        config = job.config
        self._goodput = goodput
        self._guard, self._trackers, self._progress, self._config = guard, trackers, progress, config
        # All at once: a schedule is some twenty operations, each compiled, and each a trip to the device for one step.
        self._rates = np.asarray(schedule(config.optimizer, config.train.steps)(jnp.arange(config.train.steps)))
        outside, experts = forward_flops_per_token(config.model, job.blueprint.vocab, config.data.sequence_length)
        self._flops = outside, experts / config.model.moe.top_k
        self._peak, source = peak_flops(job.mesh.size)
        say(f"MFU is against {self._peak / 1e12:.3g} TFLOP/s ({source})")
        self._pending: _Pending | None = None
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that belongs to no step."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def put(self, step: int, metrics: StepMetrics, beside: Scalars) -> None:
        """Hand over a step's metrics, still on the devices, and what the host knows of it."""
        self.flush()
        self._pending = _Pending(step, metrics, beside)

    def flush(self, more: Scalars | None = None) -> None:
        """Write the step that waits, and ``more`` beside it. Its time runs from when the step before it was written."""
        if self._pending is None:
            return
        (step, metrics, beside), self._pending = self._pending, None
        fetched = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        rate = float(self._rates[max(0, step - 1 - self._guard.skipped)])  # skipped steps do not count
        scalars = step_scalars(fetched, rate, seconds, self._flops, self._peak) | beside | (more or {})
        scalars |= scalars_of(self._goodput.seconds)
        self._trackers.load(step, fetched.stats)
        if more or step % self._config.train.log_every == 0:
            self._trackers.write(step, scalars)
        self._progress.show(step, scalars)
        self._guard.see(step, fetched)
