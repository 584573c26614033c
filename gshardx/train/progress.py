"""What a run says as it goes: a bar on a terminal, lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType

import jax
import rich.progress

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, at most one line of progress in this time."""


class Progress:
    """A bar on a terminal, a line now and then elsewhere; process 0 only."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._last_line = -math.inf
        self._bar: rich.progress.Progress | None = None
        if jax.process_index() == 0 and sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        if "evaluation/bits_per_byte" in scalars and step < self._steps:
            self.say(f"step {step}: {scalars['evaluation/bits_per_byte']:.3f} bits per byte of held-out text")
        text = (
            f"loss {scalars['learning/loss']:.3f}  {scalars['perf/tokens_per_second']:,.0f} tokens/s  "
            f"MFU {scalars['perf/mfu']:.0%}  dropped {scalars['moe/drop_fraction']:.1%}  "
            f"load max/mean {scalars['moe/load_max_over_mean']:.2f}"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, text=text.split("  MFU")[0])
        elif jax.process_index() == 0 and (
            time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or step == self._steps
        ):
            self._last_line = time.monotonic()
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif jax.process_index() == 0:
            print(text, flush=True)
