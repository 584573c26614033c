"""The figures that one looks for first."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gshardx.report.marks import faults, restarts
from gshardx.report.read import LARGEST_STEP, Run
from gshardx.report.series import recent
from gshardx.report.text import DASH, count, escape, figure, percent, short


class Figure(NamedTuple):
    value: str
    about: str = ""


def headline(runs: Sequence[Run]) -> str:
    """A row of figures, each with a value for every run."""
    tiles = "".join(_tile(name, read, runs) for name, read in FIGURES)
    return f'<dl class="headline">{tiles}</dl>'


def _tile(name: str, read: Callable[[Run], Figure], runs: Sequence[Run]) -> str:
    values = "".join(
        f'<dd class="r{index}">{escape(one.value)} <small>{escape(one.about)}</small></dd>'
        for index, one in enumerate(map(read, runs))
    )
    return f"<div><dt>{name}</dt>{values}</div>"


def _steps(run: Run) -> Figure:
    planned = run.config.get("train.steps")
    return Figure(count(run.span[1]), f"of {count(planned)}" if type(planned) is int and planned < LARGEST_STEP else "")


def _loss(run: Run) -> Figure:
    loss = run.get("learning/loss")
    if len(loss.values) and not np.isfinite(loss.values[-1]):
        return Figure("not finite", f"last {figure(loss.last, 3)}")
    return Figure(figure(loss.last, 3), "nats per token" if loss.last is not None else "")


def _bits(run: Run) -> Figure:
    steps, values = run.get("evaluation/bits_per_byte").finite
    if not len(values):
        return Figure(DASH, "not evaluated")
    return Figure(figure(float(values.min()), 3), f"at step {count(steps[values.argmin()])}")


def _speed(run: Run) -> Figure:
    values = run.get("perf/tokens_per_second").finite.values
    mfu = run.get("perf/mfu").finite.values
    used = f"MFU {percent(float(np.median(mfu)))}" if len(mfu) else ""
    return Figure(short(float(np.median(values))) if len(values) else DASH, used)


def _goodput(run: Run) -> Figure:
    total = sum(run.goodput.values())
    return Figure(
        percent(run.goodput.get("step", 0.0) / total) if total else DASH, "of the time" if total else "not told"
    )


def _drops(run: Run) -> Figure:
    return Figure(percent(recent(run.get("moe/drop_fraction"))), "of choices, lately")


def _faults(run: Run) -> Figure:
    again = restarts(run)
    return Figure(count(len(faults(run))), f"{again} restart{'' if again == 1 else 's'}")


FIGURES: tuple[tuple[str, Callable[[Run], Figure]], ...] = (
    ("Step reached", _steps),
    ("Last loss", _loss),
    ("Best bits per byte", _bits),
    ("Tokens/s, median", _speed),
    ("Goodput", _goodput),
    ("Dropped", _drops),
    ("Faults", _faults),
)
