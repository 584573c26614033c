"""Which dispatcher is faster where: einsum or gather as groups grow, ragged or gather without drops. One device."""

import itertools
import math
from typing import Any

from layers import Case, moe
from timing import Table, median_ms, ratio, take_turns

from gshardx.layers import Dispatcher, Einsum, Gather, Ragged
from gshardx.sharding import MeshConfig, build_mesh

LENGTHS = (32, 128, 256, 512, 1024, 4096)
"""Of a group, s; each point has as many tokens as the last."""
DROPLESS = tuple((e, k, s) for e, k in ((4, 2), (8, 2), (16, 2), (64, 8)) for s in (32, 128, 512))
"""e, k and s."""


def table(rounds: int, small: bool) -> Table:
    rows, notes = [], []
    width, hidden = (16, 16) if small else (256, 512)
    lengths = (4, 16) if small else LENGTHS
    for experts in (8,) if small else (8, 64):
        ratios = {}
        for s in lengths:
            case = Case(lengths[-1] // s, s, width, hidden, experts)
            rows.append(duel(case, {"einsum": Einsum(), "gather": Gather()}, rounds))
            ratios[s / hidden] = rows[-1]["first / second"]
        notes.append(f"e = {experts}: {crossing(ratios)}")
    for experts, top_k, s in DROPLESS[:1] if small else DROPLESS:
        case = Case(2, s, width, hidden, experts, top_k, factor=None)
        rows.append(duel(case, {"ragged": Ragged(), "gather": Gather()}, rounds))
    return Table(f"Crossover: one device, fwd+bwd, {case.letters('mh')}", rows, notes)


def duel(case: Case, dispatchers: dict[str, Dispatcher], rounds: int) -> dict[str, Any]:
    mesh = build_mesh(MeshConfig())
    calls = {name: moe(case, dispatcher, mesh).ready(backward=True) for name, dispatcher in dispatchers.items()}
    seconds = take_turns(calls, rounds)
    first, second = calls
    return {
        "first / second": ratio(seconds, first, second),
        "first": first,
        "second": second,
        "capacity": "dropless" if case.factor is None else case.factor,
        "e": case.experts,
        "k": case.top_k,
        "e/k": case.experts / case.top_k,
        "g": case.groups,
        "s": case.tokens,
        "s/h": case.tokens / case.hidden,
        "first ms": median_ms(seconds, first),
        "second ms": median_ms(seconds, second),
    }


def crossing(ratios: dict[float, float]) -> str:
    """Where einsum over gather passes 1, interpolated on logarithmic axes."""
    points = [(math.log(at), math.log(value)) for at, value in sorted(ratios.items())]
    for (x, y), (later_x, later_y) in itertools.pairwise(points):
        if y < 0 <= later_y:
            return f"gather is faster from s/h = {math.exp(x - y * (later_x - x) / (later_y - y)):.2g}"
    return "gather is faster throughout" if points[0][1] >= 0 else "einsum is faster throughout"
