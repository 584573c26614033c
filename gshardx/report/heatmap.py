"""Every expert's load over the steps, a panel for each layer and run."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gshardx.report.axis import Axis
from gshardx.report.charts import script, steps_below
from gshardx.report.picture import FULL, LEVELS, levels, picture
from gshardx.report.read import Floats, Load, Run
from gshardx.report.series import RECENT
from gshardx.report.text import TIMES, escape, short

ROWS, EDGE = 64, 16
"""More experts than ROWS are sorted by load; the EDGE busiest and idlest keep rows of their own, the others share."""
COLUMNS, FEWEST_COLUMNS, CELLS = 200, 40, 280_000
"""Windows in a panel; the cells of all panels together bound the page's size."""
DEAD = 0.01
"""An expert with less of the mean load."""
LARGEST_CODE = 65535


class Grid(NamedTuple):
    span: tuple[int, int]
    """The step before the first window and that of the last."""
    values: Floats
    """[column, layer, expert]"""


def heat_maps(runs: Sequence[Run]) -> str:
    """A card of panels: those of a layer side by side. "" where no run has told its load."""
    loads = [run.load for run in runs if run.load is not None]
    if not loads:
        return ""
    rows = max(min(load.values.shape[2], ROWS) for load in loads)
    layers = max(load.values.shape[1] for load in loads)
    limit = max(FEWEST_COLUMNS, min(COLUMNS, CELLS // (rows * layers * len(loads))))
    grids = [None if run.load is None else resample(run.load, limit) for run in runs]
    panels = [
        _panel(run, index if len(runs) > 1 else None, grid, layer)
        if grid is not None and layer < grid.values.shape[1]
        else "<div></div>"
        for layer in range(layers)
        for index, (run, grid) in enumerate(zip(runs, grids, strict=True))
    ]
    sorted_ = any(load.values.shape[2] > ROWS for load in loads)
    order = (
        f"Experts are sorted by their recent load, the busiest on top; the {EDGE} busiest and the {EDGE} idlest have a "
        "row each, those between them share rows, which show means."
        if sorted_
        else "A row is an expert, 0 on top."
    )
    several = "pairs" if len(runs) > 1 else "many" if layers > 8 else "some" if layers > 1 else "one"
    return (
        '<section class="card wide heat"><h3>Expert load <small>choices of an expert over the mean of its layer</small>'
        f'</h3><div class="how"><p>{order} Balance is 1.</p>{_legend()}</div>'
        f'<div class="panels {several}">{"".join(panels)}</div></section>'
    )


def resample(load: Load, limit: int) -> Grid:
    """At most ``limit`` columns of equally many steps: means of the windows in each, or the one around it."""
    steps = load.steps.astype(np.float64)
    first = max(0.0, steps[0] - (steps[1] - steps[0])) if len(steps) > 1 else 0.0
    last = max(steps[-1], first + 1)
    before = np.append(first, steps[:-1])
    columns = min(limit, round((last - first) / max(1.0, (steps - before).min())))
    middles = (before + steps) / 2
    place = np.clip((middles - first) / (last - first) * columns, 0, columns - 1).astype(int)
    values = np.zeros((columns, *load.values.shape[1:]))
    np.add.at(values, place, load.values)
    windows = np.bincount(place, minlength=columns)
    values /= np.maximum(windows, 1)[:, None, None]
    centres = first + (np.arange(columns) + 0.5) / columns * (last - first)
    around = np.minimum(np.searchsorted(steps, centres), len(steps) - 1)
    values[windows == 0] = load.values[around[windows == 0]]
    return Grid((int(first), int(last)), values)


def rows_of(values: Floats) -> list[list[int]]:
    """The experts of each row, for one layer's load [column, expert]."""
    experts = values.shape[1]
    if experts <= ROWS:
        return [[expert] for expert in range(experts)]
    order = np.argsort(-now(values), kind="stable").tolist()
    shared = np.array_split(np.array(order[EDGE:-EDGE]), ROWS - 2 * EDGE)
    return [[e] for e in order[:EDGE]] + [row.tolist() for row in shared] + [[e] for e in order[-EDGE:]]


def now(values: Floats) -> Floats:
    """Mean load over the last tenth of the columns [column, expert]."""
    return values[-max(1, int(len(values) * RECENT)) :].mean(0)


def _panel(run: Run, index: int | None, grid: Grid, layer: int) -> str:
    values = grid.values[:, layer]
    members = rows_of(values)
    cells = np.stack([values[:, row].mean(1) for row in members])
    load = now(values)
    dead, experts = int((load < DEAD).sum()), len(load)
    said = (
        f"busiest {short(float(load.max()))} {TIMES} mean, idlest {short(float(load.min()))} {TIMES}, "
        f"{dead if dead else 'none'} of {experts} dead"
    )
    chip = "" if index is None else f'<span class="chip r{index}">{escape(run.name)}</span> '
    across = Axis(grid.span[0], grid.span[1])
    height = max(112, min(208, len(members) * 12))
    hint = escape(f"Expert load of MoE layer {layer}, {run.name}: {said}")
    data = {
        "span": grid.span,
        "columns": cells.shape[1],
        "rows": [_name(row, experts) for row in members],
        "load": _code(cells),
    }
    return (
        f'<figure class="panel{" collapsed" if dead > experts / 2 else ""}"><figcaption>'
        f"{chip}<b>MoE layer {layer}</b> <small>now: {said}</small></figcaption>"
        f'<div class="frame"><div class="y" aria-hidden="true">{_row_labels(members, experts)}</div>'
        f'<div class="plot grid" tabindex="0" style="height:{height}px">{picture(levels(cells), hint)}</div>'
        f"{steps_below(across)}</div>{script(data)}</figure>"
    )


def _name(row: list[int], experts: int) -> str:
    if len(row) == 1:
        return f"expert {row[0]}"
    return f"mean of {len(row)} experts ({', '.join(map(str, row[:4]))}{', …' if len(row) > 4 else ''})"


def _row_labels(members: list[list[int]], experts: int) -> str:
    if experts > ROWS:
        return '<span style="bottom:96%">busiest</span><span style="bottom:4%">idlest</span>'
    apart = next(step for step in (1, 2, 4, 8, 16, 32) if experts / step <= 8)
    return "".join(
        f'<span style="bottom:{1 - (row + 0.5) / experts:.1%}">{row}</span>' for row in range(0, experts, apart)
    )


def _code(cells: Floats) -> str:
    """Hundredths, 16 bits each, little-endian, row by row."""
    return base64.b64encode(np.minimum(np.round(cells * 100), LARGEST_CODE).astype("<u2").tobytes()).decode()


def _legend() -> str:
    scale = picture(np.arange(LEVELS, dtype=np.uint8)[None], "")
    loads = (0.0, 0.5, 1.0, 2.0, FULL)
    places = levels(np.array(loads)) / (LEVELS - 1)
    labels = "".join(
        f'<span style="left:{place:.0%}">{load:g}{" or more" if load == FULL else ""}</span>'
        for place, load in zip(places, loads, strict=True)
    )
    return f'<div class="scale" role="img" aria-label="Blue: less than the mean. Orange: more.">{scale}{labels}</div>'
