"""What went wrong and when, as thin vertical lines over the curves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gshardx.report.axis import Axis
from gshardx.report.read import Event, Run, Series
from gshardx.report.text import escape

ROUTINE = ("start", "end", "checkpoint")
FINEST = 150
"""Faults closer than this part of the axis share a line."""
SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Mark:
    step: int
    text: str
    kind: str
    """fault or restart."""
    run: int


def faults(run: Run) -> list[Event]:
    """Events that nobody planned. A run without events.jsonl tells of what its guard has counted."""
    if run.events is not None:
        return [event for event in run.events if event.kind not in ROUTINE]
    return _counted(run.get("guard/skipped_steps"), "skipped_step", "gradients were not finite: nothing changed") + (
        _counted(run.get("guard/rollbacks"), "rollback", "the loss spiked: back to a checkpoint")
    )


def restarts(run: Run) -> int:
    """Starts after the first."""
    seen = sum(event.kind == "start" for event in run.events or [])
    return max(0, (run.starts or 0) - 1, seen - 1)


def marks_of(runs: Sequence[Run]) -> list[Mark]:
    """Of every run, in the order of steps; those too close to tell apart are one."""
    span = max(run.span[1] for run in runs)
    found = [mark for index, run in enumerate(runs) for mark in _together(_marks(run, index), max(1, span // FINEST))]
    return sorted(found, key=lambda mark: mark.step)


def lines(marks: Sequence[Mark], across: Axis) -> str:
    """SVG; a wider line that is not seen makes each easy to point at."""
    drawn = []
    for mark in marks:
        x = SIZE * float(across.place(np.array(float(mark.step))))
        if 0 <= x <= SIZE:
            line = f'd="M{x:.1f} 0V{SIZE}"'
            drawn.append(
                f'<g class="mark {mark.kind} r{mark.run}"><title>{escape(mark.text)}</title>'
                f'<path class="reach" {line}/><path {line}/></g>'
            )
    return "".join(drawn)


def data(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    return [{"step": mark.step, "text": mark.text, "run": mark.run} for mark in marks]


def _marks(run: Run, index: int) -> list[Mark]:
    found = [Mark(event.step, _words(event), "fault", index) for event in faults(run) if event.step is not None]
    starts = [event for event in run.events or [] if event.kind == "start"][1:]
    found += [Mark(e.step, f"step {e.step}: started again", "restart", index) for e in starts if e.step is not None]
    loss = run.get("learning/loss")
    bad = loss.steps[~np.isfinite(loss.values)]
    found += [Mark(int(step), f"step {step}: the loss is not finite", "fault", index) for step in bad]
    return sorted(found, key=lambda mark: mark.step)


def _together(marks: Sequence[Mark], reach: int) -> list[Mark]:
    groups: list[list[Mark]] = []
    for mark in marks:
        if groups and mark.step - groups[-1][0].step < reach:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    found = []
    for group in groups:
        first = next((mark for mark in group if mark.kind == "fault"), group[0])
        more = f" (and {len(group) - 1:,} more up to step {group[-1].step})" if len(group) > 1 else ""
        found.append(dataclasses.replace(first, text=first.text + more))
    return found


def _words(event: Event) -> str:
    said = event.text.removeprefix(f"step {event.step}: ")
    return f"step {event.step}: {event.kind.replace('_', ' ')}{f', {said}' if said else ''}"


def _counted(counts: Series, kind: str, text: str) -> list[Event]:
    """An event for each logged step at which a counter had grown."""
    steps, values = counts.finite
    grown = np.diff(values, prepend=0.0)
    return [
        Event(None, int(step), kind, text if more == 1 else f"{more:.0f} times: {text}", {})
        for step, more in zip(steps, grown, strict=True)
        if more > 0
    ]
