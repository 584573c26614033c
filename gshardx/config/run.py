"""What surrounds the steps of a run: checkpoints, guard rails, watchdog, profiles, trackers."""

import dataclasses
import math
from typing import Literal

from gshardx.config.checks import at_least_zero, positive
from gshardx.errors import BadInput


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep (docs/checkpoints.md)."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: float | None = None
    """Save also when so many minutes have passed since the last one; null: by steps only."""
    keep: int = 3
    """Newest checkpoints to keep; at least 2, so that a damaged one has an older to fall back to."""
    keep_every: int | None = None
    """Keep also every step that this divides; null: none."""
    keep_best: int = 1
    """Keep also so many checkpoints with the least evaluation/bits_per_byte; an evaluation (train.eval_every) that is
    among the best so far saves one."""
    on_error: Literal["stop", "continue"] = "stop"
    """When one can't be saved (a full disk): stop, or say so, go on, and try again when the next is due. The last
    step's must succeed."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every", "every_minutes", "keep_every")
        at_least_zero("checkpoint", self, "keep_best")
        if self.keep < 2:
            raise BadInput(f"checkpoint.keep = {self.keep}: a damaged checkpoint needs an older one; use 2 or more")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What a run does when training goes wrong (docs/training.md)."""

    max_skipped: int = 10
    """Steps in a row whose gradients are not finite, and which change nothing, after which the run ends."""
    spike_factor: float | None = None
    """A loss above this multiple of the median of the last spike_window steps is a spike: the run goes back to the last
    good checkpoint and leaves out the batches since; null: never."""
    spike_window: int = 50
    """Steps whose median loss is the measure; no spike is seen before there are as many."""
    max_rollbacks: int = 3
    """Times that a run goes back; then it ends."""
    router_logit: float = 1000.0
    """Largest router logit, in absolute value, above which a layer is named in a warning."""

    def __post_init__(self) -> None:
        positive("guard", self, "max_skipped", "spike_window", "router_logit")
        at_least_zero("guard", self, "max_rollbacks")
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise BadInput(f"guard.spike_factor = {self.spike_factor}: must be above 1 and finite; use 2, or null")


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Help to find out what a step does; each slows a run down."""

    nans: bool = False
    """Where a gradient is not finite, repeat the step operation by operation and name the one that made it so."""
    dump_hlo: bool = False
    """Write each compiled step to RUN_DIR/hlo, before and after XLA's optimisation."""


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """What a run does when it hangs (docs/runs.md)."""

    factor: float = 20.0
    """A step that takes this many times the median of the last ones hangs..."""
    at_least: float = 120.0
    """...if it also takes so many seconds; a process that was not heard of for as long hangs, too."""
    action: Literal["report", "exit"] = "report"
    """report: name what hangs and print every thread's stack; exit: then end with exit code 3, on every process."""

    def __post_init__(self) -> None:
        positive("watchdog", self, "at_least")
        if not 1 < self.factor < math.inf:
            raise BadInput(f"watchdog.factor = {self.factor}: must be above 1 and finite; use 20")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps of process 0 for xprof, in RUN_DIR/profile (docs/runs.md)."""

    start: int | None = None
    """The first step of the trace; null: none."""
    steps: int = 3
    """How many."""

    def __post_init__(self) -> None:
        positive("profile", self, "start", "steps")


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go beside RUN_DIR/metrics.jsonl."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = dataclasses.field(
        default_factory=lambda: ["tensorboard"]
    )
    """wandb and trackio: pip install 'gshardx[wandb]', 'gshardx[trackio]' (docs/runs.md)."""
    project: str = "gshardx"
    """Of wandb and trackio."""
    name: str | None = None
    """Of the run there; null: the run directory's name."""
