"""What stays the same while a run steps."""

import dataclasses

import jax

from gshardx.data.prefetch import Ahead
from gshardx.train.events import Events
from gshardx.train.goodput import Goodput
from gshardx.train.job import Job
from gshardx.train.objective import Batch
from gshardx.train.run_dir import RunDir
from gshardx.train.text import Text
from gshardx.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Session:
    """A run under way."""

    job: Job
    run: RunDir
    text: Text
    rows: Ahead[Batch]
    facts: dict[str, str]
    caught: list[int]
    """Signals, see :func:`gshardx.train.signals.caught_signals`."""
    goodput: Goodput
    events: Events
    watchdog: Watchdog

    def say(self, event: str, line: str) -> None:
        """Print, and note as an event."""
        say(line)
        self.events.tell(event, line)


def say(line: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)
