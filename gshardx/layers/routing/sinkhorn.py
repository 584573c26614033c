"""Sinkhorn routing (S-BASE, Clark et al., arXiv 2202.01169): the k best of an even transport plan, greedy at inference.

    z = x W;  K = exp(z / temperature)                    fp32
    plan = d0 K d1, in turns, of a group's T real tokens:
        d0[t] = 1 / (T sum_e K[t, e] d1[e])               each token gives 1 / T
        d1[e] = 1 / (E sum_t K[t, e] d0[t])               each expert gets 1 / E
    training:  chosen are the k largest of the plan; no gradient passes it
    inference: the k largest z
    w = sigmoid(z) if k is 1, else softmax(z), at the chosen

d0 is the same for all of a token's choices, so z / temperature + log d1 decides: an offset an expert. In logarithms, so
that large logits stay finite. Megatron-Core iterates until d1 changes by less than 1e-4 in the mean; here the number of
iterations is fixed, as devices that stop by what they see would have to ask each other, and more only come closer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter

_NEAR = 1e-3
"""Logarithms of the plan that are as near to the best as this are tied, and z decides. An even plan of one token, or of
tokens that are alike, has the same share for every expert: there rounding (some 1e-6) would choose, and otherwise on
each mesh."""
_NOTHING = -1e30
"""Logarithm of what padding gives; finite, so that a group of padding alone has no NaN."""


class SinkhornRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`:

    iterations: of the plan.
    temperature: of the plan alone; lingvo's optimal transport has 0.1, with 50 iterations.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        iterations: int = 50,
        temperature: float = 1.0,
        **common: Any,
    ) -> None:
        if iterations < 1:
            raise BadInput(f"iterations = {iterations}: a plan needs one at least; use 50")
        if temperature <= 0:
            raise BadInput(f"temperature = {temperature}: must be above 0; use 1.0, or 0.1 for a sharper plan")
        super().__init__(width, num_experts, top_k, **common)
        self.iterations, self.temperature = iterations, temperature

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        if rng is None:
            experts = top_k(logits, self.top_k)
        else:
            scores = jax.lax.stop_gradient(logits) / self.temperature
            experts = chosen(scores + offsets(scores, valid, self.iterations), logits, self.top_k)
        gates = jax.nn.softmax(logits, axis=-1)
        weights = take(jax.nn.sigmoid(logits) if self.top_k == 1 else gates, experts)
        return self.route(Gating(logits, gates, experts, valid), weights, rng=rng)


def offsets(scores: Float[Array, "g s e"], valid: Bool[Array, "g s"], iterations: int) -> Float[Array, "g 1 e"]:
    """log d1."""
    real = valid[..., None]
    tokens = jnp.maximum(real.sum(1, keepdims=True), 1).astype(jnp.float32)

    def iteration(_: int, log_d1: Float[Array, "g 1 e"]) -> Float[Array, "g 1 e"]:
        log_d0 = -jnp.log(tokens) - jax.nn.logsumexp(scores + log_d1, axis=2, keepdims=True)
        given = jnp.where(real, scores + log_d0, _NOTHING)
        return -jnp.log(scores.shape[-1]) - jax.nn.logsumexp(given, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, iteration, jnp.zeros_like(scores[:, :1]))


def chosen(plan: Float[Array, "g s e"], logits: Float[Array, "g s e"], k: int) -> Int[Array, "g s k"]:
    """The k largest of the plan's logarithms, best first; of those tied with the best that is left, the largest
    logit."""
    left, experts = jnp.ones(plan.shape, bool), []
    plan = jnp.nan_to_num(plan)  # else no expert would be near the best
    for _ in range(k):
        best = jnp.where(left, plan, -jnp.inf).max(-1, keepdims=True)
        experts.append(top_k(jnp.where(left & (plan >= best - _NEAR), logits, -jnp.inf), 1))
        left &= experts[-1] != jnp.arange(plan.shape[-1], dtype=jnp.int32)
    return jnp.concatenate(experts, axis=-1)
