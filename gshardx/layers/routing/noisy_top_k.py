"""Noisy top-k gating of the first sparsely-gated MoE layer (Shazeer et al., arXiv 1701.06538, section 2.1, appendix A).

    H = x W_g + N(0, 1) softplus(x W_n)                   fp32; without noise at inference
    chosen: the k largest of H
    w = softmax of H over the chosen
    importance = CV(sum_x w)^2                            CV: standard deviation over mean, of the experts
    load = CV(sum_x P(x))^2
    P(x)_i = Phi((x W_g - H's k-th largest without i) / softplus(x W_n)), the chance that i is chosen if only its own
             noise is drawn again

Both losses are over the whole batch, 0 at best, and weigh 0.1 in the paper: ``losses: {importance: 0.1, load: 0.1}``. P
has a gradient where the choice has none. Both kernels start at 0 there; here W_g starts as every router's does.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import Gating, Sums
from gshardx.layers.draws import draw
from gshardx.layers.losses import ImportanceLoss
from gshardx.layers.param import param
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


@dataclasses.dataclass(frozen=True)
class ChanceLoss(ImportanceLoss):
    """CV^2 of the experts' chances to be chosen, summed over the batch (arXiv 1701.06538 eq. 10 and 11).

    ``own``: these chances, ``[g, s, e]``.
    """

    def sums(self, gating: Gating) -> Sums:
        return (jnp.sum(gating.own * gating.valid[..., None], axis=(0, 1)),)


class NoisyTopKRouter(LinearRouter):
    """Args: those of :class:`LinearRouter`. ``load`` is 0 without an rng, as nothing is drawn then."""

    LOSSES = {**LinearRouter.LOSSES, "load": ChanceLoss()}  # noqa: RUF012

    def __init__(self, width: int, num_experts: int, top_k: int, *, rngs: nnx.Rngs, **common: Any) -> None:
        super().__init__(width, num_experts, top_k, rngs=rngs, **common)
        self.noise = param(rngs.params(), "embed router", (width, num_experts), jax.nn.initializers.zeros)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        gating, weights = self.decision(tokens, valid, rng)
        return self.route(gating, weights, rng=rng)

    def decision(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None
    ) -> tuple[Gating, Float[Array, "g s k"]]:
        """What is chosen, and what each choice weighs."""
        clean = logits = self.logits(tokens)
        chances = jnp.ones_like(clean)
        if rng is not None:
            deviation = jax.nn.softplus(self.product(tokens, self.noise))
            logits = clean + draw(jax.random.normal, rng, clean.shape) * deviation
            chances = chances_of(clean, logits, deviation, self.top_k)
        experts = top_k(logits, self.top_k)
        weights = jax.nn.softmax(take(logits, experts), axis=-1)
        chosen = experts[..., None] == jnp.arange(self.num_experts, dtype=jnp.int32)
        gates = jnp.einsum("gsk,gske->gse", weights, chosen.astype(weights.dtype))
        return Gating(logits, gates, experts, valid, own=chances), weights


def chances_of(
    clean: Float[Array, "g s e"], noisy: Float[Array, "g s e"], deviation: Float[Array, "g s e"], k: int
) -> Float[Array, "g s e"]:
    """P(x): of each expert to be among the ``k`` best, given the others' noisy logits; 1 if all are chosen."""
    if k == clean.shape[-1]:
        return jnp.ones_like(clean)
    best = take(noisy, top_k(noisy, k + 1))
    last, next_one = best[..., k - 1, None], best[..., k, None]
    threshold = jnp.where(noisy > next_one, next_one, last)  # without i: who is in has the next one to beat
    return jax.scipy.stats.norm.cdf((clean - threshold) / deviation)
