"""What a run's numbers warn of, in plain words."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from gshardx.report.heatmap import now
from gshardx.report.read import Run, Series
from gshardx.report.series import recent
from gshardx.report.text import TIMES, count, duration, percent, short

DROPPED, LOST = 0.2, 0.1
NEAR = 0.9
"""Share of E / k, the greatest load over mean that k different choices leave possible."""
FEW = 4.0
"""E / k below which the busiest expert tells little: 2 of 4 experts may differ much and each still learn."""
NO_ENTROPY = 0.05
"""Share of ln E."""
MOST_EXPERTS = 2**20


def findings(run: Run) -> list[str]:
    """One sentence for each trouble; those of the present look at the last tenth of the run."""
    checks: tuple[Callable[[Run], Iterator[str]], ...] = (_not_finite, _collapsed, _drops, _lost)
    return [line for check in checks for line in check(run)]


def expert_count(run: Run) -> int | None:
    """Of a layer, from the config or the logged load."""
    value = run.config.get("model.moe.num_experts")
    if type(value) is int and 0 < value < MOST_EXPERTS:
        return value
    return run.load.values.shape[2] if run.load is not None else None


def _not_finite(run: Run) -> Iterator[str]:
    for name, words in (("learning/loss", "training"), ("evaluation/loss", "evaluation")):
        series = run.get(name)
        bad = series.steps[~np.isfinite(series.values)]
        if len(bad):
            yield (
                f"The {words} loss was not finite at {count(len(bad))} logged step{'s' if len(bad) > 1 else ''}, first "
                f"at step {count(bad[0])}. Lower optimizer.learning_rate, or find the cause with --debug.nans true."
            )


def _collapsed(run: Run) -> Iterator[str]:
    experts = expert_count(run)
    if not experts or experts < 2:
        return
    reasons: dict[int, list[str]] = {}
    for layer, why in _signs(run, experts):
        reasons.setdefault(layer, []).append(why)
    for layer, whys in list(reasons.items())[:3]:
        yield (
            f"The router of MoE layer {layer} has collapsed: {', '.join(whys)}. Look at the expert load below; a "
            "greater weight in model.moe.losses (balance, z) or a lower learning rate helps."
        )
    if len(reasons) > 3:
        yield f"{len(reasons) - 3} more routers have collapsed: MoE layers {', '.join(map(str, list(reasons)[3:]))}."


def _signs(run: Run, experts: int) -> Iterator[tuple[int, str]]:
    """Layers, and what says that they have collapsed."""
    top = run.config.get("model.moe.top_k")
    most = experts / top if type(top) is int and 0 < top < experts else None
    for layer, busiest in enumerate(_busiest(run)):
        if most and most >= FEW and busiest >= NEAR * most:
            yield (
                layer,
                f"its busiest expert gets {short(busiest)} {TIMES} the mean load ({short(most)} is the most possible)",
            )
    for layer, entropy in _by_layer(run, "entropy"):
        if entropy < NO_ENTROPY * math.log(experts):
            yield layer, f"its entropy is {short(entropy)} nats of {short(math.log(experts))}"
    for layer, dead in _by_layer(run, "dead_experts"):
        if dead > experts / 2:
            yield layer, f"{dead:.0f} of its {experts} experts get no tokens"


def _by_layer(run: Run, figure: str) -> Iterator[tuple[int, float]]:
    for layer, series in enumerate(run.layers(figure)):
        value = recent(series)
        if value is not None:
            yield layer, value


def _busiest(run: Run) -> list[float]:
    """Load of each layer's busiest expert over the mean."""
    logged = [recent(series) or 0.0 for series in run.layers("load_max_over_mean")]
    if not logged and run.load is not None:
        return [float(now(run.load.values[:, layer]).max()) for layer in range(run.load.values.shape[1])]
    return logged


def _drops(run: Run) -> Iterator[str]:
    dropped = recent(run.get("moe/drop_fraction"))
    if dropped is not None and dropped > DROPPED:
        worst = _worst(run.layers("drop_fraction"))
        yield (
            f"{percent(dropped)} of the choices are dropped{worst}: their tokens skip the expert. Raise "
            "model.moe.capacity_factor (null drops nothing), or balance the load."
        )


def _worst(layers: list[Series]) -> str:
    values = [recent(series) or 0.0 for series in layers]
    return f" (MoE layer {int(np.argmax(values))}: {percent(max(values))})" if len(values) > 1 else ""


def _lost(run: Run) -> Iterator[str]:
    lost, total = run.goodput.get("lost_work", 0.0), sum(run.goodput.values())
    if total and lost / total > LOST:
        yield (
            f"{percent(lost / total)} of the time ({duration(lost)}) went into steps that were lost and done again. "
            "Lower checkpoint.every, or look at the events for what ended the run."
        )
