"""What training minimises: cross-entropy of the targets, and what keeps the experts' loads even."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.config import TrainConfig
from gshardx.layers import Losses, MoEMetrics, Packed
from gshardx.models.build import Blueprint, Variables


class Batch(NamedTuple):
    """Packed documents; see :data:`gshardx.data.pipeline.Rows`."""

    tokens: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    segments: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    weights: Float[Array, "b t"]


class TokenLosses(NamedTuple):
    """Sums over the targets that count."""

    nats: Float[Array, ""]
    """Cross-entropy."""
    minimised: Float[Array, ""]
    """The same with smoothed labels and the weighted z-loss."""


class RowScores(NamedTuple):
    """Sums over the targets of each row that count."""

    nats: Float[Array, "b"]
    """Cross-entropy."""
    right: Float[Array, "b"]
    """Targets that no other token has a greater logit than."""


def token_losses(
    plan: Blueprint, variables: Variables, batch: Batch, keys: Array | None, config: TrainConfig
) -> tuple[TokenLosses, MoEMetrics]:
    """Losses of a batch's targets, and MoE metrics; ``keys``: one a row, None for inference."""
    logits, moe = _logits(plan, variables, batch, keys)
    total, of_target = jax.nn.logsumexp(logits, axis=-1), _of_target(logits, batch)
    nats = jnp.sum((total - of_target) * batch.weights)
    extra = jnp.zeros(())
    if (
        config.label_smoothing
    ):  # the target's share goes to all v: eps * mean_v(total - logit_v) for eps * (total - l_t)
        extra += config.label_smoothing * jnp.sum((of_target - logits.mean(-1)) * batch.weights)
    if config.z_loss:
        extra += config.z_loss * jnp.sum(total**2 * batch.weights)
    return TokenLosses(nats, nats + extra), moe


def row_scores(plan: Blueprint, variables: Variables, batch: Batch) -> RowScores:
    """How well each row is predicted; no token is dropped."""
    logits, _ = _logits(plan, variables, batch, None)
    # One maximum for both: over a split vocabulary it is a reduction, and an argmax would gather.
    largest, of_target = logits.max(-1), _of_target(logits, batch)
    nats = largest + jnp.log(jnp.exp(logits - largest[..., None]).sum(-1)) - of_target
    right = of_target >= largest
    return RowScores((nats * batch.weights).sum(-1), (right * batch.weights).sum(-1))


def _logits(
    plan: Blueprint, variables: Variables, batch: Batch, keys: Array | None
) -> tuple[Float[Array, "b t v"], MoEMetrics]:
    model = plan.bind(variables.params)
    hidden, _, moe = model.hidden(
        batch.tokens, batch.positions, batch.segments > 0, Packed.of(batch.segments), keys, variables.router
    )
    return model.logits(hidden), moe


def _of_target(logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, "b t"]:
    """By one-hot product: a gather's backward pass is a scatter into all logits."""
    return jnp.sum(logits * jax.nn.one_hot(batch.targets, logits.shape[-1], dtype=logits.dtype), axis=-1)


def auxiliary_loss(
    losses: Losses, weights: Mapping[str, float], balance_weight: Float[Array, "layer"]
) -> Float[Array, ""]:
    """Weighted auxiliary losses, averaged over the layers; "balance" has a weight of its own in each layer."""
    others = sum(weight * losses[name].mean() for name, weight in weights.items() if name != "balance")
    return jnp.mean(balance_weight * losses["balance"]) + others


def adapt_coefficient(
    coefficient: Float[Array, "*layer"],
    drop_fraction: Float[Array, "*layer"],
    slope: float = 0.2,
    highest: float = 0.01,
    decay: float = 0.99,
) -> Float[Array, "*layer"]:
    """Skywork-MoE's adaptive coefficient (arXiv 2406.06563 section 3.2, whose values are the defaults): a moving
    average of ``min(slope * drop_fraction, highest)``, one a layer.
    """
    return decay * coefficient + (1 - decay) * jnp.minimum(slope * drop_fraction, highest)
