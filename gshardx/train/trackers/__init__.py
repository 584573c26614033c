"""Where a run's metrics go: metrics.jsonl always, and what ``tracking.trackers`` names.

A new tracker is a new file here. A tracker's failure is said once and never ends a run.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Int

from gshardx.config import Config, TrackingConfig
from gshardx.data.pipeline import Rows
from gshardx.layers import RouterStats
from gshardx.train.metrics import Scalars
from gshardx.train.run_dir import RunDir
from gshardx.train.trace import write_trace
from gshardx.train.trackers.hosted import Hosted, check_installed
from gshardx.train.trackers.lines import Lines
from gshardx.train.trackers.load import ExpertLoad
from gshardx.train.trackers.tensorboard import Board


class Tracker(Protocol):
    """Raises OSError where it can't go on."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run, the experts' load and routing traces, on process 0; elsewhere none.

    Args:
        run: where files go.
        config: of the run.
        first_step: what earlier starts wrote for it and later steps is forgotten.
    """

    def __init__(self, run: RunDir, config: Config, first_step: int) -> None:
        self._open = dict[str, Tracker]()
        self._load: ExpertLoad | None = None
        self._routing: Path | None = None
        if jax.process_index() > 0:
            return
        made: dict[str, Callable[[], Tracker]] = {
            "metrics.jsonl": lambda: Lines(run.metrics, first_step),
            "tensorboard": lambda: Board(run.tensorboard, first_step),
            "wandb": lambda: Hosted("wandb", config, run.path, first_step),
            "trackio": lambda: Hosted("trackio", config, run.path, first_step),
        }
        for name in ("metrics.jsonl", *config.tracking.trackers):
            with _alone(name):
                self._open[name] = made[name]()
        with _alone(run.expert_load.name):
            self._load = ExpertLoad(Lines(run.expert_load, first_step), config.train.steps)
        self._routing = run.routing

    def write(self, step: int, scalars: Scalars) -> None:
        self._each(lambda tracker: tracker.write(step, scalars))

    def load(self, step: int, stats: RouterStats) -> None:
        """Of every step; ``stats``: fetched."""
        load, self._load = self._load, None
        with _alone("expert_load.jsonl"):
            if load is not None:
                load.add(step, stats)
                self._load = load

    def trace(self, step: int, rows: Rows, experts: Int[np.ndarray, "layer b t k"]) -> None:
        """Write a routing trace."""
        routing, self._routing = self._routing, None
        with _alone("routing"):
            if routing is not None:
                write_trace(routing, step, rows, experts)
                self._routing = routing

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()
        with _alone("expert_load.jsonl"):
            if self._load is not None:
                self._load.close()

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            del self._open[name]
            with _alone(name):
                action(tracker)
                self._open[name] = tracker


def check_trackers(config: TrackingConfig) -> None:
    """Raise BadInput if one is not installed."""
    for name in config.trackers:
        if name in ("wandb", "trackio"):
            check_installed(name)


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Say a failure, and go on without ``name``."""
    try:
        yield
    except OSError as error:
        print(f"{name}: can't be written any more ({error.strerror or error}); the run goes on", flush=True)
