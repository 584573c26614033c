"""SparseMixer-v2 of GRIN (arXiv 2409.12136 section 2.1) as Phi-3.5-MoE has it: k choices, one after the other.

    z = x W                                               fp32
    of the experts not chosen yet, near: those with (max z - z_i) <= 2 jitter max(|z_i|, max z)
    p = softmax(z) over these alone; chosen: the largest, or in training one drawn from p
    its weight: its p                                     weights do not add up to 1

Each choice has a softmax of its own, so the weight of an expert that has none near it is 1, and no gradient moves it.

In training that weight's gradient stands for the draw's: the sum over experts of how much the loss changes from 0 to
``p_i E_i(x)``, times the gradient of p_i. Heun's third-order method has a quarter of that change from the slope at the
whole and three quarters from the slope at a third (SparseMixer, arXiv 2310.00811): one of the two is drawn. So the
output is multiplied by ``p_i`` or ``p_i / 3``, and the gradient of either is that of p_i. The likeliest expert is
always taken whole, as at inference.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.balance import Gating
from gshardx.layers.draws import draw, folded, row_keys
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter

_WHOLE = 0.25
"""Chance of the whole output where not the likeliest expert was drawn; Heun's weight of that point."""


class SparseMixerRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`:

    jitter: half of how far, relatively, a logit may be below the best one's; 0.01 in Phi-3.5-MoE.
    input_jitter: half-width of the noise on the router's input in training.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        jitter: float = 0.01,
        input_jitter: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, **common)
        self.jitter, self.input_jitter = jitter, input_jitter

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        keys = None if rng is None else row_keys(rng, len(tokens))
        if keys is not None and self.input_jitter > 0:
            uniform = partial(jax.random.uniform, minval=1 - self.input_jitter, maxval=1 + self.input_jitter)
            noise = draw(uniform, folded(keys, self.top_k), tokens.shape)
            tokens = tokens.astype(noise.dtype) * noise
        logits = self.logits(tokens)
        left = jnp.ones(logits.shape, bool)
        experts, weights = [], []
        for choice in range(self.top_k):
            gates = jax.nn.softmax(jnp.where(near(logits, left, self.jitter), logits, -jnp.inf), axis=-1)
            best = _best(logits, left)  # gates of other logits may round to the same
            expert, factor = (best, 1.0) if keys is None else _drawn(gates, left, best, folded(keys, choice))
            weight = take(gates, expert)
            weights.append(weight + jax.lax.stop_gradient(weight * (factor - 1)))
            experts.append(expert)
            left &= expert != jnp.arange(self.num_experts, dtype=jnp.int32)
        gating = Gating(logits, jax.nn.softmax(logits, axis=-1), jnp.concatenate(experts, axis=-1), valid)
        return self.route(gating, jnp.concatenate(weights, axis=-1), rng=rng)


def _drawn(
    gates: Float[Array, "g s e"], left: Bool[Array, "g s e"], best: Int[Array, "g s 1"], keys: Array
) -> tuple[Int[Array, "g s 1"], Float[Array, "g s 1"]]:
    """An expert drawn from ``gates``, and what its weight is multiplied by."""
    chances = jnp.log(jax.lax.stop_gradient(gates))
    expert = _best(chances + draw(jax.random.gumbel, folded(keys, 0), gates.shape), left)
    whole = draw(jax.random.uniform, folded(keys, 1), expert.shape) < _WHOLE
    return expert, jnp.where(whole | (expert == best), 1.0, 1 / 3)


def _best(scores: Float[Array, "g s e"], left: Bool[Array, "g s e"]) -> Int[Array, "g s 1"]:
    """Even where all scores are NaN no token chooses an expert twice."""
    return top_k(jnp.where(left, scores, -jnp.inf), 1)


def near(logits: Float[Array, "g s e"], left: Bool[Array, "g s e"], jitter: float) -> Bool[Array, "g s e"]:
    """Experts among those ``left`` whose logits are close enough to the best of them."""
    logits = jax.lax.stop_gradient(logits)
    best = jnp.where(left, logits, -jnp.inf).max(-1, keepdims=True)
    return left & (best - logits <= 2 * jitter * jnp.maximum(jnp.abs(logits), best))
