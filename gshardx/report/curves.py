"""The page's line charts. One run is blue and its evaluations orange; of two runs each has its colour."""

import math
from collections.abc import Sequence

import numpy as np

from gshardx.report.charts import Chart, Curve
from gshardx.report.findings import expert_count
from gshardx.report.read import Run, Series
from gshardx.report.series import smooth, window

RUN = ("var(--run-0)", "var(--run-1)")
PAIRED = "Faint: as logged. Strong: means of neighbouring logged steps. Dots: evaluation."
SHALLOW, MIDDLE, DEEP = (59, 99, 196), (22, 138, 128), (186, 118, 12)
"""Colours of the first, the middle and the last MoE layer; readable on white and on black."""


def loss(runs: Sequence[Run]) -> Chart:
    curves = []
    for run, colour in zip(runs, RUN, strict=False):
        alone = len(runs) == 1
        curves += _smoothed(run.get("learning/loss"), colour, "training" if alone else run.name, told=alone)
        held_out = run.get("evaluation/loss")
        if len(held_out.finite.steps):
            said = "evaluation" if alone else f"{run.name}, evaluation"
            curves.append(Curve(said, held_out, RUN[1] if alone else colour, "measured", told=alone))
    note = "" if len(runs) == 1 else PAIRED
    return Chart("Loss", "nats per token", curves, logarithmic=True, size="wide", note=note)


def bits_per_byte(runs: Sequence[Run]) -> Chart:
    return Chart("Held-out text", "bits per byte", _evaluated(runs, "evaluation/bits_per_byte"))


def token_accuracy(runs: Sequence[Run]) -> Chart:
    return Chart("Token accuracy", "share of held-out tokens", _evaluated(runs, "evaluation/token_accuracy"))


def throughput(runs: Sequence[Run]) -> Chart:
    curves = _plain(runs, "perf/tokens_per_second", "tokens/s")
    return Chart("Throughput", "tokens per second", curves, floor=0.0)


def drop_rate(runs: Sequence[Run]) -> Chart:
    curves = _by_layer(runs, "drop_fraction")
    return Chart("Dropped choices", "share of all choices", curves, floor=0.0, size="third")


def router_entropy(runs: Sequence[Run]) -> Chart:
    curves = _by_layer(runs, "entropy")
    experts = sorted({count for count in map(expert_count, runs) if count})
    if curves:
        span = np.array([0, max(run.span[1] for run in runs)])
        for count in experts:
            most = Series(span, np.full(2, math.log(count)))
            curves.append(Curve(f"even: ln {count} = {math.log(count):.2f}", most, "var(--muted)", "limit", read=False))
    return Chart("Router entropy", "nats", curves, floor=0.0, size="third")


def busiest_expert(runs: Sequence[Run]) -> Chart:
    curves = _by_layer(runs, "load_max_over_mean")
    return Chart("Busiest expert", "load over mean", curves, floor=1.0, size="third")


def gradient_norm(runs: Sequence[Run]) -> Chart:
    return Chart("Gradient norm", "before clipping", _plain(runs, "learning/grad_norm", "norm"), logarithmic=True)


def learning_rate(runs: Sequence[Run]) -> Chart:
    curves = [
        Curve(run.name if len(runs) > 1 else "learning rate", run.get("learning/current_learning_rate"), colour)
        for run, colour in zip(runs, RUN, strict=False)
    ]
    return Chart("Learning rate", "per step", curves, floor=0.0)


def _plain(runs: Sequence[Run], name: str, word: str) -> list[Curve]:
    """A figure of each run as logged, and its mean over neighbours."""
    return [
        curve
        for run, colour in zip(runs, RUN, strict=False)
        for curve in _smoothed(run.get(name), colour, run.name if len(runs) > 1 else word, told=len(runs) == 1)
    ]


def _smoothed(series: Series, colour: str, name: str, told: bool) -> list[Curve]:
    """``told``: the legend has room for more than the name."""
    width = window(len(series.steps))
    if width < 2:
        return [Curve(name, series, colour)]
    logged = Curve(f"{name}, as logged", series, colour, "faint", told=told)
    return [logged, Curve(f"{name}, mean of {width}" if told else name, smooth(series, width), colour)]


def _evaluated(runs: Sequence[Run], name: str) -> list[Curve]:
    return [
        Curve(run.name if len(runs) > 1 else name.split("/")[1].replace("_", " "), run.get(name), colour, "measured")
        for run, colour in zip(runs, RUN if len(runs) > 1 else RUN[1:], strict=False)
        if len(run.get(name).finite.steps)
    ]


def _by_layer(runs: Sequence[Run], figure: str) -> list[Curve]:
    """Of one run a curve for each layer; of two their means over the layers, and the layers without names."""
    if len(runs) == 1:
        layers = runs[0].layers(figure)
        told = set(range(len(layers))) if len(layers) <= 6 else {0, len(layers) // 2, len(layers) - 1}
        return [
            Curve(f"MoE layer {layer}", _gentle(series), _depth(layer, len(layers)), told=layer in told)
            for layer, series in enumerate(layers)
        ]
    curves = []
    for run, colour in zip(runs, RUN, strict=False):
        curves += [Curve("", _gentle(one), colour, "faint", told=False, read=False) for one in run.layers(figure)]
        curves.append(Curve(run.name, _gentle(run.get(f"moe/{figure}")), colour))
    return curves


def _gentle(series: Series) -> Series:
    """Less smooth than the loss: here single steps matter."""
    return smooth(series, min(20, window(len(series.steps))))


def _depth(layer: int, layers: int) -> str:
    place = layer / (layers - 1) if layers > 1 else 0.0
    channels = (np.interp(place, (0, 0.5, 1), ends) for ends in zip(SHALLOW, MIDDLE, DEEP, strict=True))
    return f"#{''.join(f'{round(float(channel)):02x}' for channel in channels)}"
