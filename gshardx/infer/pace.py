"""How far ahead of its results an engine works: each call that was started is one that a newcomer waits for."""

from collections.abc import Hashable, Iterable

LEARNT = 0.2
"""Weight of the newest call in what one is expected to take: about the last five count."""


class Pace:
    """What calls take here, by program, and how much of them may be started at once.

    Args:
        ahead_ms: milliseconds of work that may lie before a newcomer; None: any.
    """

    def __init__(self, ahead_ms: float | None) -> None:
        self._most = None if ahead_ms is None else ahead_ms / 2e3  # of each of two calls, the running and the next one
        self._seconds: dict[Hashable, float] = {}

    def steps(self, program: Hashable, most: int) -> int:
        """Tokens that each row may draw in one call, up to ``most``; one where nothing is known yet."""
        if self._most is None:
            return most
        each = self._seconds.get(program)
        return 1 if each is None else max(1, min(most, int(self._most / each)))

    def enough(self, unread: Iterable[tuple[Hashable, int]]) -> bool:
        """Whether calls of so many steps are as much as may be started before one is read."""
        if self._most is None:
            return False
        return sum(self._seconds.get(program, 0.0) * steps for program, steps in unread) > self._most

    def learn(self, program: Hashable, steps: int, seconds: float) -> None:
        """A call of so many took so long."""
        each = seconds / steps
        before = self._seconds.get(program, each)
        self._seconds[program] = before + LEARNT * (each - before)
