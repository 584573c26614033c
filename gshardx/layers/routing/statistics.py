"""What routers report: sums over real tokens, so that groups, devices and micro-batches add up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

POSITION_BINS = 8
"""Parts of a group in which drops are counted. OpenMoE (arXiv 2402.01739) saw them pile up towards the end."""


class RouterStats(NamedTuple):
    """Sums over the real tokens of all groups, fp32; a leading layer axis once stacked. Properties are ratios of them.

    A choice is a real token's wish for an expert; a dropped choice found no slot there.
    """

    tokens: Float[Array, "*layer"]
    choices: Float[Array, "*layer k"]
    """By choice rank."""
    dropped: Float[Array, "*layer k"]
    """By choice rank."""
    load: Float[Array, "*layer e"]
    """Choices of each expert that took a number: dropped ones too, and those a coin rejected (``slots="paper"``). Of an
    expert that is merged with others, its shares."""
    room: Float[Array, "*layer"]
    """Slots of all experts in all groups."""
    entropy: Float[Array, "*layer"]
    """Of the gates, nats."""
    z: Float[Array, "*layer"]
    """Squared logsumexp of the logits (ST-MoE, arXiv 2202.08906)."""
    largest_logit: Float[Array, "*layer"]
    """In absolute value; a maximum, not a sum."""
    choices_by_position: Float[Array, "*layer p"]
    """By eighth of the group."""
    dropped_by_position: Float[Array, "*layer p"]

    @property
    def drop_fraction(self) -> Any:
        """Share of the choices that found no slot."""
        return self.dropped.sum(-1) / jnp.maximum(self.choices.sum(-1), 1.0)

    @property
    def load_max_over_mean(self) -> Any:
        """Choices of the busiest expert over the mean; 1.0 is perfect balance. MaxVio (DeepSeek) is this less 1."""
        return self.load.max(-1) * self.load.shape[-1] / jnp.maximum(self.load.sum(-1), 1.0)


def merged(a: RouterStats, b: RouterStats) -> RouterStats:
    """Of two batches together."""
    added: Any = RouterStats(*(jnp.add(x, y) for x, y in zip(a, b, strict=True)))  # type: ignore[arg-type]
    return added._replace(largest_logit=jnp.maximum(a.largest_logit, b.largest_logit))


def describe(stats: RouterStats) -> dict[str, Any]:
    """Every figure of one or more layers by its name, NumPy, for fetched ``stats``."""
    s: Any = RouterStats(*(np.asarray(value, np.float64) for value in stats))  # type: ignore[arg-type]
    tokens, choices = np.maximum(s.tokens, 1), np.maximum(s.choices.sum(-1), 1)
    share = s.load / np.maximum(s.load.mean(-1, keepdims=True), 1e-9)
    ordered = np.sort(share, axis=-1)
    figures = {
        "drop_fraction": s.dropped.sum(-1) / choices,
        "load_max_over_mean": ordered[..., -1],
        "max_violation": ordered[..., -1] - 1,
        "load_p10": _quantile(ordered, 0.1),
        "load_p50": _quantile(ordered, 0.5),
        "load_p90": _quantile(ordered, 0.9),
        "load_cv_squared": share.var(-1),
        "dead_experts": (s.load == 0).sum(-1),
        "entropy": s.entropy / tokens,
        "capacity_used": (s.choices - s.dropped).sum(-1) / np.maximum(s.room, 1),
        "z": s.z / tokens,
        "largest_logit": s.largest_logit,
    }
    by_rank = s.dropped / np.maximum(s.choices, 1)
    by_position = s.dropped_by_position / np.maximum(s.choices_by_position, 1)
    figures |= {f"drop_fraction_choice_{rank + 1}": by_rank[..., rank] for rank in range(by_rank.shape[-1])}
    figures |= {f"drop_fraction_eighth_{part + 1}": by_position[..., part] for part in range(POSITION_BINS)}
    return figures


def _quantile(ordered: np.ndarray, part: float) -> np.ndarray:
    """Linear between neighbours, as ``np.quantile``, which does more than a step's telemetry has time for."""
    place = part * (ordered.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[-1] - 1)
    return np.asarray(ordered[..., low] + (place - low) * (ordered[..., high] - ordered[..., low]))


def count(
    logits: Float[Array, "g s e"],
    gates: Float[Array, "g s e"],
    chosen: Bool[Array, "g s k"] | Float[Array, "g s k"],
    keep: Bool[Array, "g s k"],
    load: Int[Array, "g e"] | Float[Array, "g e"],
    valid: Bool[Array, "g s"],
    capacity: int,
) -> RouterStats:
    """Statistics of one call.

    Args:
        logits: the router's scores.
        gates: a distribution over experts.
        chosen: choices of real tokens that wanted a slot; or parts of slots, where these are mixtures.
        keep: those that got one.
        load: choices of each expert.
        valid: False for padding.
        capacity: slots of an expert for a group.
    """
    logits, gates = jax.lax.stop_gradient((logits, gates))
    (g, s, k), e = chosen.shape, load.shape[-1]
    real = valid.astype(jnp.float32)
    wanted = chosen.astype(jnp.float32)
    lost = jnp.where(keep, 0.0, wanted)
    part = jnp.arange(s) * POSITION_BINS // s
    in_part = (part[:, None] == jnp.arange(POSITION_BINS)).astype(jnp.float32)
    entropy = -jnp.sum(gates * jnp.log(jnp.maximum(gates, 1e-30)), axis=-1)
    z = jax.nn.logsumexp(logits, axis=-1) ** 2
    # One vector, so that the mesh adds it up in one all-reduce.
    columns = [
        jnp.stack([real.sum(1), (entropy * real).sum(1), (z * real).sum(1)], axis=-1),
        wanted.sum(1),
        lost.sum(1),
        load.astype(jnp.float32),
        jnp.einsum("gs,sp->gp", wanted.sum(-1), in_part),
        jnp.einsum("gs,sp->gp", lost.sum(-1), in_part),
    ]
    ends = np.cumsum([3, k, k, e, POSITION_BINS])
    scalars, choices, dropped, loads, by_part, lost_by_part = jnp.split(jnp.concatenate(columns, -1).sum(0), ends)
    return RouterStats(
        tokens=scalars[0],
        choices=choices,
        dropped=dropped,
        load=loads,
        room=jnp.float32(g * e * capacity),
        entropy=scalars[1],
        z=scalars[2],
        largest_logit=jnp.max(jnp.abs(logits) * real[..., None]),
        choices_by_position=by_part,
        dropped_by_position=lost_by_part,
    )
