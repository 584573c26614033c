"""Line charts: an SVG that stretches with the page, and labels beside it in the page's own type.

Lines keep their width however the SVG is stretched (``vector-effect``), and labels stay readable on a phone.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gshardx.report.axis import Axis, fit
from gshardx.report.marks import Mark, lines
from gshardx.report.read import Floats, Series
from gshardx.report.series import thin
from gshardx.report.text import escape, short

SIZE = 1000
"""Units of the SVG's sides."""
CURVE_POINTS, CHART_POINTS, FEWEST_POINTS = 1000, 4000, 100
"""At most so many points in a curve, and about so many in a chart of many curves."""
DOTS = 60
"""A curve of so many points or fewer shows each."""


@dataclasses.dataclass(frozen=True)
class Curve:
    name: str
    series: Series
    colour: str
    """Of CSS."""
    look: str = "line"
    """line; faint; measured (a line with a dot for each of its points); limit (dashed)."""
    told: bool = True
    """In the legend."""
    read: bool = True
    """By the crosshair."""


@dataclasses.dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    """Of the vertical axis."""
    curves: Sequence[Curve]
    floor: float | None = None
    """The vertical axis begins here or lower."""
    logarithmic: bool = False
    """The vertical axis may be."""
    size: str = "half"
    """Of a row of cards: half, third or wide."""
    note: str = ""

    def html(self, span: tuple[int, int], marks: Sequence[Mark]) -> str:
        """A figure; "" where there is nothing to draw. ``span``: the steps of the horizontal axis."""
        limit = min(CURVE_POINTS, max(FEWEST_POINTS, CHART_POINTS // max(1, len(self.curves))))
        curves = [dataclasses.replace(curve, series=thin(curve.series, limit)) for curve in self.curves]
        across = Axis(span[0], span[1] if span[1] > span[0] else span[0] + 1)
        up = fit([curve.series.values for curve in curves], self.floor, self.logarithmic)
        if up is None:
            return ""
        unit = f"{self.unit}, log scale" if up.logarithmic else self.unit
        drawn = "".join(_draw(curve, across, up) for curve in curves)
        return (
            f'<figure class="card chart {self.size}">'
            f"<figcaption><h3>{escape(self.title)} <small>{escape(unit)}</small></h3>"
            f"{_legend(self.curves)}</figcaption>"
            f"{frame(across, up, _grid(up) + lines(marks, across) + drawn, self._summary(), _data(curves, across))}"
            f"{f'<p class=note>{escape(self.note)}</p>' if self.note else ''}</figure>"
        )

    def _summary(self) -> str:
        """What somebody who can't see the chart is told."""
        parts = []
        for curve in self.curves[:6]:
            steps, values = curve.series.finite
            if len(values) and curve.look != "limit":
                parts.append(
                    f"{curve.name}: {short(float(values[0]))} at step {steps[0]}, {short(float(values[-1]))} at step "
                    f"{steps[-1]}, least {short(float(values.min()))}, greatest {short(float(values.max()))}"
                )
        return f"{self.title}. {'; '.join(parts)}"


def frame(across: Axis, up: Axis, drawn: str, summary: str, data: dict[str, Any]) -> str:
    """The plot with its labels and, for the page's script, its numbers."""
    height = "".join(f'<span style="bottom:{place:.1%}">{label}</span>' for place, label in up.ticks(3))
    return (
        f'<div class="frame"><div class="y" aria-hidden="true">{height}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(summary)}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg></div>'
        f"{steps_below(across)}</div>{script(data)}"
    )


def steps_below(across: Axis) -> str:
    """The labels of a horizontal axis of steps."""
    ticks = [(place, label) for place, label in across.ticks(4) if place < 0.87]  # room for "step"
    return (
        '<div class="x" aria-hidden="true">'
        + "".join(f'<span style="left:{place:.1%}">{label}</span>' for place, label in ticks)
        + '<span class="unit">step</span></div>'
    )


def script(data: dict[str, Any]) -> str:
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _grid(up: Axis) -> str:
    places = (SIZE * (1 - place) for place, _ in up.ticks(3))
    return f'<path class="grid" d="{"".join(f"M0 {y:.1f}H{SIZE}" for y in places)}"/>'


def _draw(curve: Curve, across: Axis, up: Axis) -> str:
    x = SIZE * across.place(curve.series.steps.astype(np.float64))
    y = SIZE * (1 - up.place(curve.series.values))
    look = "line" if curve.look == "measured" else curve.look
    drawn = f'<path class="{look}" style="stroke:{curve.colour}" d="{_path(x, y)}"/>'
    if curve.look == "measured" and len(x) <= DOTS:
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True) if np.isfinite(b))
        drawn += f'<path class="halo" d="{dots}"/><path class="dots" style="stroke:{curve.colour}" d="{dots}"/>'
    return drawn


def _path(x: Floats, y: Floats) -> str:
    """Straight lines between finite points; a point between two gaps is a dot."""
    parts, pen_down = [], False
    finite = np.append(np.isfinite(y), False)
    for place, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if finite[place]:
            alone = not pen_down and not finite[place + 1]
            parts.append(f"{'L' if pen_down else 'M'}{a:.1f} {b:.1f}{'h0' if alone else ''}")
        pen_down = bool(finite[place])
    return "".join(parts)


def _legend(curves: Sequence[Curve]) -> str:
    told = [curve for curve in curves if curve.told]
    if len(told) < 2:
        return ""
    items = "".join(
        f'<li><i class="{curve.look}" style="--c:{curve.colour}"></i>{escape(curve.name)}</li>' for curve in told
    )
    return f'<ul class="legend">{items}</ul>'


def _data(curves: Sequence[Curve], across: Axis) -> dict[str, Any]:
    return {
        "span": [across.low, across.high],
        "curves": [
            {
                "name": curve.name,
                "colour": curve.colour,
                "x": curve.series.finite.steps.tolist(),
                "y": [float(f"{value:.5g}") for value in curve.series.finite.values],
            }
            for curve in curves
            if curve.read
        ],
    }
