"""Where the seconds of a run go, over all its starts: each belongs to one bucket.

A run is the time in which a process of it lives, from its creation to its end; what lies between two starts is none of
it. Names and meaning are those of Google's goodput library (ml-goodput-measurement), which needs a cloud's log.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Bucket = Literal["init", "compile", "data_wait", "step", "checkpoint_stall", "restore", "lost_work", "evaluation"]
BUCKETS: tuple[Bucket, ...] = (
    "init", "compile", "data_wait", "step", "checkpoint_stall", "restore", "lost_work", "evaluation"
)  # fmt: skip
_LOSABLE: tuple[Bucket, ...] = ("step", "data_wait", "checkpoint_stall", "evaluation")
BEAT = 0.5
"""Seconds between two writes. A killed process is taken to have died half of it after its last one, or when it last
wrote down a step, if that was later; it is believed for two."""
_REMEMBERED = 100  # saved steps


class Goodput:
    """A clock that is always in one bucket, and a file that survives the process.

    Args:
        path: RUN_DIR/goodput.json, read if it is there; None: keep no file.
        steps: the file to which the run adds a line a step.

    Attributes:
        bucket: the present one.
        starts: of the run, this one included.
        killed: whether the one before was.
    """

    def __init__(self, path: Path | None, steps: Path | None = None) -> None:
        before = _read(path)
        self._path, self._lock = path, threading.Lock()
        self._seconds: dict[Bucket, float] = {name: before.get("seconds", {}).get(name, 0.0) for name in BUCKETS}
        self._saved: dict[str, dict[Bucket, float]] = before.get("saved", {})
        self.bucket: Bucket = "init"
        self.starts = before.get("starts", 0) + 1
        self.killed = bool(before) and not before.get("ended")
        if self.killed:
            died_in: Bucket = before.get("bucket", "step")
            lived = _written(steps) - before.get("until", 0.0)
            self._seconds[died_in] += min(max(BEAT / 2, lived), 2 * BEAT)
        self._since = time.perf_counter() - _process_age()

    def enter(self, bucket: Bucket) -> None:
        """From now on."""
        with self._lock:
            self._settle()
            self.bucket = bucket

    @contextlib.contextmanager
    def spending(self, bucket: Bucket) -> Iterator[None]:
        """Within, time goes to ``bucket``."""
        outside = self.bucket
        self.enter(bucket)
        try:
            yield
        finally:
            self.enter(outside)

    @property
    def seconds(self) -> dict[Bucket, float]:
        """Of each bucket until now."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def saved(self, step: int) -> None:
        """A checkpoint of ``step`` holds what was done until now."""
        now = self.seconds
        self._saved[str(step)] = {name: now[name] for name in _LOSABLE}
        for old in sorted(self._saved, key=int)[:-_REMEMBERED]:
            del self._saved[old]

    def back_to(self, step: int) -> None:
        """What was done since the checkpoint of ``step`` (0: the start) is lost."""
        then = dict.fromkeys(_LOSABLE, 0.0) if step == 0 else self._saved.get(str(step))
        if then is None:
            return  # saved by a version that kept no such file
        with self._lock:
            self._settle()
            for name in _LOSABLE:
                lost = max(0.0, self._seconds[name] - then[name])
                self._seconds[name] -= lost
                self._seconds["lost_work"] += lost
        self._saved = {saved: at for saved, at in self._saved.items() if int(saved) <= step}

    def write(self, *, ended: bool = False) -> None:
        """Put the file in place; a disk that refuses it never ends a run."""
        if self._path is None:
            return
        content = {
            "seconds": self.seconds, "bucket": self.bucket, "saved": self._saved, "starts": self.starts,
            "until": time.time(), "ended": ended,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            scratch = self._path.with_suffix(".tmp")
            scratch.write_text(json.dumps(content))
            scratch.replace(self._path)

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self.bucket] += now - self._since
        self._since = now


def scalars_of(seconds: dict[Bucket, float]) -> dict[str, float]:
    """As metrics: ``goodput/BUCKET``, seconds of the whole run so far."""
    return {f"goodput/{name}": value for name, value in seconds.items()}


def in_words(seconds: dict[Bucket, float]) -> str:
    """One line: the share of steps, and where the rest went."""
    whole = max(sum(seconds.values()), 1e-9)
    rest = sorted(((value, name) for name, value in seconds.items() if name != "step"), reverse=True)
    said = ", ".join(f"{name.replace('_', ' ')} {value / whole:.1%}" for value, name in rest if value / whole >= 0.001)
    return f"{seconds['step'] / whole:.1%} of {whole:,.1f} s were steps" + (f"; {said}" if said else "")


def _read(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(path: Path | None) -> float:
    """When ``path`` was last written to; 0: never."""
    try:
        return path.stat().st_mtime if path is not None else 0.0
    except OSError:
        return 0.0


def _process_age() -> float:
    """Seconds since this process was created, where Linux tells."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
