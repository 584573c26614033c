"""How far a reading of files has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

import rich.progress

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, at most one line in this time."""


class Bar:
    """Counts bytes up to ``total``."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._last_line = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.DownloadColumn(),
                rich.progress.TransferSpeedColumn(),
                rich.progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> "Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """``count`` bytes more have been read."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            print(f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB", flush=True)
