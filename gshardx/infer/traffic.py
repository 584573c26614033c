"""What a load generator sends and when, before any of it is sent: arrivals, prompts, lengths, clients that vanish.

Everything follows from a seed. Arrivals, lengths, words and vanishing are drawn apart, so that changing one of them
leaves the others as they were.
"""

import difflib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gshardx.errors import BadInput

Lengths = Callable[[np.random.Generator], int]
"""Draws a number of tokens, from 1 to :data:`MOST`."""

MOST = 10_000_000
"""Tokens of a prompt or an answer: over any model's context."""

WORDS = """
a about above act add after again air all also am an and animal answer any are as ask at away back ball be because bed
been before began being best big bird black blue boat body book both box boy bring but by call came can car care carry
change child city clear close cold come could country cut dark day did do does dog done door down draw each early earth
east easy eat egg end enough even ever every eye face fall family far farm fast father feel feet few field find fire
first fish five fly follow food foot for form found four free friend from full game gave get girl give go gold good
got great green ground group grow had half hand hard has have he head hear heart heat help her here high him his hold
home horse hot hour house how hundred idea if in is island it its just keep kind king knew know land large last late
laugh lay learn leave left less let letter life light like line list little live long look lot love low made make man
many map mark may me mean men might mile mind money moon more morning most mother mountain move much music must my name
near need never new next night no north not note now number of off often oh old on once one only open or order other
our out over own page paper part pass people picture place plan plant play point power press problem pull put question
quick rain ran reach read real red rest right river road rock room round rule run said same sat saw say school sea
second see seem sell send sentence set seven she ship short should show side sing sit six sleep slow small snow so some
song soon sound south space stand star start state stay step still stone stop story street strong such summer sun sure
table take talk teach tell ten than that the their them then there these they thing think this those though three
through time to together told too took top town travel tree true try turn two under until up us use very voice wait
walk wall want war warm was watch water way we week well went were west what wheel when where which while white who
whole why will wind winter wish with woman wonder wood word work world would write year yes yet you young your
""".split()  # noqa: SIM905
"""Common ones: most tokenizers have a token for each."""


class Arrival(NamedTuple):
    """A request whose prompt and lengths may still be open (None)."""

    at: float
    """Seconds after the start."""
    prompt: str | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None


class Planned(NamedTuple):
    """A request to send."""

    at: float
    """Seconds after the start."""
    prompt: str
    max_tokens: int
    leave_after: int | None
    """The client closes its connection after so many pieces of text, with 0 once its request is sent; None: never."""


def lengths(text: str, name: str) -> Lengths:
    """A distribution from how it is written: ``64``, ``uniform:16:128`` (both ends may come), ``lognormal:64:0.5``.

    Args:
        text: what stands on the command line.
        name: the flag, for messages.

    Raises:
        BadInput: it is none of them.
    """
    match text.split(":"):
        case [one] if (fixed := _whole(one)) is not None:
            return lambda draw: fixed
        case ["uniform", least, most] if (low := _whole(least)) is not None and (high := _whole(most)) is not None:
            if low <= high:
                return lambda draw: int(draw.integers(low, high, endpoint=True))
        case ["lognormal", middle, width] if (median := _whole(middle)) is not None:
            sigma = _number(width)
            if sigma is not None and 0 <= sigma <= 10:
                return lambda draw: min(MOST, max(1, round(median * math.exp(sigma * draw.standard_normal()))))
    raise BadInput(
        f"{name} {text}: no distribution of whole numbers from 1 to {MOST:,}; write 64, uniform:16:128 (least, most) "
        "or lognormal:64:0.5 (median, sigma)"
    )


def rate(text: str) -> float:
    """Requests per second, or infinity.

    Raises:
        BadInput: no such number.
    """
    value = _number(text, finite=False)
    if value is None or value <= 0:
        raise BadInput(f"--rate {text}: must be requests per second over 0, or inf for all at once")
    return value


def poisson(rate: float, seed: int) -> Iterator[Arrival]:
    """Arrivals without end, as of many people who don't know of each other; all at once for an infinite rate."""
    draw, at = np.random.default_rng((seed, 0)), 0.0
    while True:
        yield Arrival(at)
        at += draw.exponential(1 / rate)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals of a file, one JSON object a line, in order of time.

    Raises:
        BadInput: a file that can't be read, or a line that is no arrival.
    """
    try:
        with path.open("rb") as file:
            found = [_arrival(raw, f"{path}, line {number}") for number, raw in enumerate(file, 1)]
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    if not found:
        raise BadInput(f'{path}: no lines in it; write {{"at": 0.0, "prompt_tokens": 64}}, one a line')
    return sorted(found, key=lambda arrival: arrival.at)


def limited(arrivals: Iterable[Arrival], requests: int | None, seconds: float | None) -> Iterator[Arrival]:
    """The first ``requests`` of those before ``seconds``; None: no limit."""
    early = arrivals if seconds is None else itertools.takewhile(lambda arrival: arrival.at < seconds, arrivals)
    return itertools.islice(early, requests)


def plan(
    arrivals: Iterable[Arrival], prompt_tokens: Lengths, max_tokens: Lengths, cancel: float, seed: int
) -> Iterator[Planned]:
    """Draw what is still open of each arrival.

    A client that leaves, as the share ``cancel`` of them does, stays for a number of pieces of text below
    ``max_tokens``, few more often than many: those that wait for the first get lost most often.
    """
    sizes, words, leaves = (np.random.default_rng((seed, purpose)) for purpose in (1, 2, 3))
    for arrival in arrivals:
        # All are drawn for each request, needed or not, so that one line of a trace changes no other.
        count, most, (leaving, moment) = prompt_tokens(sizes), max_tokens(sizes), leaves.random(2)
        count, most = arrival.prompt_tokens or count, arrival.max_tokens or most
        prompt = " ".join(WORDS[word] for word in words.integers(0, len(WORDS), count))
        leave_after = int(most**moment) - 1 if leaving < cancel else None
        yield Planned(arrival.at, prompt if arrival.prompt is None else arrival.prompt, most, leave_after)


def _arrival(raw: bytes, where: str) -> Arrival:
    try:
        found = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadInput(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(found, dict) or "at" not in found:
        raise BadInput(f'{where}: no time under "at"; write {{"at": 0.5}}, in seconds after the start')
    for name, value in found.items():
        if name not in Arrival._fields:
            nearest = difflib.get_close_matches(name, Arrival._fields, n=1, cutoff=0.0)[0]
            raise BadInput(f"{where}: unknown key {name}; did you mean {nearest}?")
        if not _fits(name, value):
            raise BadInput(f"{where}: {name} = {json.dumps(value)}: must be {_MEANT[name]}")
    return Arrival(**found)


_MEANT = {
    "at": "seconds after the start",
    "prompt": "text",
    "prompt_tokens": f"a whole number from 1 to {MOST:,}",
    "max_tokens": f"a whole number from 1 to {MOST:,}",
}


def _fits(name: str, value: Any) -> bool:
    if name == "prompt":
        return isinstance(value, str)
    if name == "at":
        return type(value) in (int, float) and 0 <= value < math.inf
    return type(value) is int and 1 <= value <= MOST


def _whole(text: str) -> int | None:
    """A whole number from 1 to :data:`MOST`."""
    value = _number(text) if text.isascii() and text.isdigit() else None
    return int(value) if value is not None and 1 <= value <= MOST else None


def _number(text: str, finite: bool = True) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) or (finite and math.isinf(value)) else value
