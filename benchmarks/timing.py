"""Timing in turns, and the Markdown tables and goals that benchmarks print, or write into a page.

Needs no framework but JAX's wait."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

Seconds = dict[str, list[float]]
"""Of each candidate, one a round."""


def seconds_of(action: Callable[[], Any]) -> float:
    """Until everything that ``action`` returns has been computed."""
    start = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - start


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Run each once unmeasured, then once a round, so that a slow minute of the machine does not hit one alone.

    Every other round runs backwards.
    """
    for action in candidates.values():
        seconds_of(action)
    found: Seconds = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates) if number % 2 == 0 else reversed(candidates):
            found[name].append(seconds_of(candidates[name]))
    return found


def ratio(seconds: Seconds, name: str, other: str) -> float:
    """The median over rounds of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def median_ms(seconds: Seconds, name: str) -> float:
    return 1e3 * statistics.median(seconds[name])


class Table(NamedTuple):
    """Rows with the same keys, which are the column names; notes follow below."""

    title: str
    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()

    def markdown(self) -> Iterator[str]:
        names = list(self.rows[0])
        yield f"### {self.title}"
        yield ""
        yield f"| {' | '.join(names)} |"
        yield "|" + "---|" * len(names)
        for row in self.rows:
            yield f"| {' | '.join(cell(row[name]) for name in names)} |"
        if self.notes:
            yield ""
        yield from (f"- {note}" for note in self.notes)
        yield ""


def cell(value: Any) -> str:
    """Three digits of a float, all of an integer, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        return f"{round(value, digits):,.{max(digits, 0)}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")


def goal(what: str, value: float, limit: float, *, at_least: bool = False, unit: str = " x") -> str:
    """One line: the goal, what it is, and whether it is reached."""
    reached = value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    return f"goal: {what} {bound} {limit:g}{unit}; it is {cell(value)}{unit}: {'reached' if reached else 'missed'}"


def filled(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its markers of ``name``.

    Raises:
        SystemExit: no markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"the page has no {begin} ... {end}; add both, each on a line of its own")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"
