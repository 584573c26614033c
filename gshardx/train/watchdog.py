"""A thread that notices when a run hangs: a step that does not end, a process that is not heard of."""

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from gshardx.config import WatchdogConfig
from gshardx.sharding.peers import Peers
from gshardx.train.events import Events
from gshardx.train.goodput import BEAT, Goodput

_WINDOW = 50  # steps whose median is the measure
_JUDGED = ("step", "data_wait", "checkpoint_stall")
"""Buckets in which a step's time is the measure; evaluations, compilations and restores take as long as they take."""


class Watchdog:
    """Judges the time since the last step ended; also writes the goodput file, which has to go on in a hang.

    Args:
        config: what is too long, and what to do then.
        goodput: what the run does at present.
        events: where a hang is noted.
        peers: the other processes.
        dump: writes every thread's stack; default: to stderr.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        goodput: Goodput,
        events: Events,
        peers: Peers,
        dump: Callable[[], None] = lambda: faulthandler.dump_traceback(sys.stderr, all_threads=True),
    ) -> None:
        self._config, self._goodput, self._events, self._peers, self._dump = config, goodput, events, peers, dump
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._last: float | None = None
        self._barked = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)  # it may itself wait for a disk that has gone

    def step(self, step: int) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        if self._barked:
            self._say("going_on", f"step {step} has ended")
        self._last, self._barked = now, False
        self._peers.doing = f"step {step + 1}"

    @property
    def limit(self) -> float:
        """Seconds after which a step hangs."""
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._config.at_least, self._config.factor * usual)

    def look(self) -> None:
        """Judge the present moment."""
        if self._barked or self._last is None:
            return
        taken, silent = time.monotonic() - self._last, self._peers.silent
        gone = {name: seconds for name, seconds in silent.items() if seconds > self._config.at_least}
        if not gone and (taken <= self.limit or self._goodput.bucket not in _JUDGED):
            return
        self._barked = True
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        line = f"a step has taken {taken:.0f} s so far, and the median is {usual:.2g} s"
        if silent:
            line += f"; not heard of: {', '.join(f'{name}, {seconds:.0f} s ago' for name, seconds in silent.items())}"
        self._say("hang", line)
        self._dump()
        if self._config.action == "exit":
            self._peers.leave(f"the run hangs: {line} (watchdog.action = exit)")

    def _say(self, event: str, line: str) -> None:
        print(f"watchdog: {line}", file=sys.stderr, flush=True)
        self._events.tell(event, line)

    def _watch(self) -> None:
        while not self._over.wait(BEAT):
            self._goodput.write()
            self.look()
