"""Names and values of a step's line."""

import numpy as np

from gshardx.layers.routing.statistics import describe
from gshardx.train.step import StepMetrics

Scalars = dict[str, float]


def step_scalars(
    metrics: StepMetrics, learning_rate: float, seconds: float, flops: tuple[float, float], peak: float
) -> Scalars:
    """Names and values of one step's line.

    Args:
        metrics: fetched to the host.
        learning_rate: of this step.
        seconds: that the step took.
        flops: forward FLOPs of a token outside the experts, and of one of its choices.
        peak: FLOP/s of the devices. Choices that were not kept count no FLOPs.
    """
    layers = describe(metrics.stats)
    tokens, stats = int(metrics.tokens), metrics.stats
    kept = float(np.mean((stats.choices.sum(-1) - stats.dropped.sum(-1)) / np.maximum(stats.tokens, 1)))
    useful = 3 * tokens * (flops[0] + flops[1] * kept)
    scalars = {
        "learning/loss": float(metrics.loss),
        "learning/aux_loss": float(np.mean(metrics.aux_losses["balance"])),
        "learning/grad_norm": float(metrics.grad_norm),
        "guard/skipped_steps": float(metrics.skipped),
        "guard/rollbacks": float(metrics.rollbacks),
        "learning/current_learning_rate": learning_rate,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": tokens / seconds,
        "perf/useful_tflops_per_second": useful / seconds / 1e12,
        "perf/mfu": useful / seconds / peak,
    }
    others = (name for name in metrics.aux_losses if name != "balance")
    scalars |= {f"learning/aux_{name}_loss": float(np.mean(metrics.aux_losses[name])) for name in others}
    layers["balance_weight"] = np.asarray(metrics.balance_weight)
    table = np.stack(list(layers.values())).astype(float)  # one conversion, not one a number
    for name, mean, by_layer in zip(layers, table.mean(-1).tolist(), table.tolist(), strict=True):
        scalars[f"moe/{name}"] = max(by_layer) if name == "largest_logit" else mean
        scalars |= {f"moe/layer_{layer}/{name}": value for layer, value in enumerate(by_layer)}
    return scalars
