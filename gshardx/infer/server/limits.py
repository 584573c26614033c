"""What a server takes on: everything is bounded, and who is refused is told when to come back."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

from gshardx.errors import BadInput
from gshardx.infer.server.worker import EngineDown, Worker

REMEMBERED = 10.0
"""Seconds; the weight of what was seen of the service rate falls to 1 / e in as many."""
LONGEST = 120.0
"""Seconds that anybody is told to wait: OpenAI's client gives up where it is told more."""
FOR_RETURNS = 0.9
"""Share of the service rate that those who were told to come back may take; the rest is for who comes unasked."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Raises:
    BadInput: one that is not positive.
    """

    max_queue: int = 256
    """Continuations that wait for a place; ``n`` of one request count as n."""
    max_queued_tokens: int = 65_536
    """Of the prompts that wait."""
    max_wait: float = 30.0
    """Seconds that a request may be expected to wait for its start; it is refused where that takes longer."""
    max_open: int = 64
    """Requests at once of one API key; without keys, of one address."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    deadline: float = 600.0
    """Seconds from a request's arrival to its end."""
    drain: float = 30.0
    """Seconds that open requests are given to end after SIGTERM."""
    stall: float = 5.0
    """Seconds without a step of the engine, though there is work, after which it is taken to hang."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise BadInput(f"--{field.name} {getattr(self, field.name)}: must be more than 0")


class Refused(Exception):
    """Not now. seconds: after which there should be room."""

    def __init__(self, why: str, seconds: float) -> None:
        super().__init__(why)
        self.seconds = max(1, math.ceil(seconds))


class ServiceRate:
    """How fast those that wait are let in: as fast as others end, seen while somebody waited."""

    def __init__(self) -> None:
        self._seconds = self._ended = 0.0
        self._since: float | None = None

    def note(self, now: float, ended: int, waiting: bool) -> None:
        if self._since is not None:
            passed = now - self._since
            kept = math.exp(-passed / REMEMBERED)
            self._seconds, self._ended = self._seconds * kept + passed, self._ended * kept + ended
        self._since = now if waiting else None

    def seconds(self, count: int) -> float | None:
        """Until ``count`` of those that wait were let in; None: not known yet."""
        return count * self._seconds / self._ended if self._ended >= 1 else None


class Admission:
    """Args:
    limits: what to keep to.
    slots: sequences that the engine computes at once.
    """

    def __init__(self, limits: Limits, slots: int) -> None:
        self.limits, self.slots, self.rate = limits, slots, ServiceRate()
        self.refused = 0
        self._promised = 0.0
        """When, on ``time.monotonic``'s clock, all those told to come back will have been let in, if all do."""
        self._open: collections.Counter[str] = collections.Counter()

    def ended(self, count: int, waiting: bool) -> None:
        """What :class:`Worker` tells after each step."""
        self.rate.note(time.monotonic(), count, waiting)

    @contextlib.contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """While a request of ``owner`` is open.

        Raises:
            Refused: it has as many as it may.
        """
        if self._open[owner] >= self.limits.max_open:
            raise self._no(f"{self.limits.max_open} requests of {owner} are open; wait for one to end", 1.0)
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]

    def check(self, worker: Worker, count: int, tokens: int = 0) -> None:
        """Whether ``count`` more sequences with ``tokens`` tokens of prompts may wait. Before tokens are counted, ask
        without: it costs nothing then to refuse.

        Raises:
            Refused: no.
            EngineDown: nothing is let in any more, however long one waits.
        """
        if trouble := worker.trouble:
            raise EngineDown(trouble)
        load, limits = worker.load(), self.limits
        behind = max(0, load.waiting - (self.slots - load.running))  # those that find a free slot do not wait
        wait = self.rate.seconds(behind + count)
        if not behind:
            return
        if behind + count > limits.max_queue:
            why = f"{behind} requests wait, and no more than {limits.max_queue} may"
        elif load.waiting_tokens + tokens > limits.max_queued_tokens:
            why = f"prompts of {load.waiting_tokens} tokens wait, and {limits.max_queued_tokens} may"
        elif wait is not None and wait > limits.max_wait:
            why = f"it would wait for about {wait:.0f} s, and {limits.max_wait:g} are allowed"
        else:
            return
        raise self._no(why, self._turn(behind, count))

    def _turn(self, behind: int, count: int) -> float:
        """Seconds until the queue is empty and those refused before have come back and been let in: were all told when
        the queue is empty, they would all come then."""
        now, each = time.monotonic(), self.rate.seconds(1) or 0.0
        # They are told whole seconds, so all of one second may come at once: these and one more must find room.
        apart = max(1 / max(0.5, self.limits.max_queue - 1), each / FOR_RETURNS)
        turn = max(self._promised, now + behind * each)
        self._promised = min(turn + count * apart, now + LONGEST)
        return min(turn - now, LONGEST)

    def _no(self, why: str, seconds: float) -> Refused:
        self.refused += 1
        return Refused(f"too many requests: {why}", seconds)
