"""Quantile balancing (Su, kexue.fm/archives/11619; as in Megatron-Core, pull request 5349): an offset an expert, moved
to where each would have got its share of the tokens.

    s = x W                                               fp32; or its sigmoid
    chosen: the k largest s - beta
    w = scale * p / sum_chosen p, p = sigmoid(x W)        or softmax; beta is not part of the weights
    in training, of each group's n real tokens:
        alpha[t] = the (k + 1)-th largest s - beta        what an expert has to beat to be chosen
        q[e] = the (n k / E + 1)-th largest s - alpha     n k / E tokens choose e if this is its beta
    after each step: beta = momentum beta + (1 - momentum) q less its mean, q the mean over tokens of all groups

A step of coordinate descent on the dual of the even assignment with the largest sum: it needs no rate. Kimi K3 has
``choose_by="sigmoid"``.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter, normalised


class QuantileState(NamedTuple):
    """beta: subtracted for the choice only. total, tokens: since the last step, of all devices: the groups' quantiles,
    each as often as the group has tokens, and those tokens."""

    beta: Float[Array, "e"]
    total: Float[Array, "e"]
    tokens: Float[Array, ""]


class QuantileRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`:

    score: p.
    choose_by: s, the logits in Megatron-Core, their sigmoid in Kimi K3.
    renormalise: divide p of the chosen by their sum.
    scale: factor on the weights.
    momentum: the part of the old beta that stays.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "sigmoid",
        choose_by: Literal["logits", "sigmoid"] = "logits",
        renormalise: bool = True,
        scale: float = 1.0,
        momentum: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, **common)
        if top_k == num_experts:
            raise BadInput(f"top_k = {top_k} of as many experts: nothing to balance; use less, or another router")
        if not 0 <= momentum < 1:
            raise BadInput(f"momentum = {momentum}: must be 0 or more and below 1; use 0.0, or 0.9 to smooth")
        self.score, self.choose_by, self.renormalise = score, choose_by, renormalise
        self.scale, self.momentum = scale, momentum

    def initial_state(self) -> QuantileState:
        return QuantileState(jnp.zeros(self.num_experts), jnp.zeros(self.num_experts), jnp.zeros(()))

    def after_step(self, state: QuantileState) -> QuantileState:
        mean = state.total / jnp.maximum(state.tokens, 1.0)
        beta = self.momentum * state.beta + (1 - self.momentum) * mean
        beta = jnp.where(state.tokens > 0, beta - beta.mean(), state.beta)
        return QuantileState(beta, jnp.zeros_like(state.total), jnp.zeros_like(state.tokens))

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: QuantileState
    ) -> Routing:
        logits = self.logits(tokens)
        sigmoid = jax.nn.sigmoid(logits)
        scores = sigmoid if self.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        by = jax.lax.stop_gradient(logits if self.choose_by == "logits" else sigmoid)
        left = by - state.beta
        best = top_k(left, self.top_k + 1)
        experts = best[..., :-1]
        weights = take(scores, experts)
        if self.renormalise:
            weights = normalised(weights, 1e-20)
        gating = Gating(logits, normalised(scores, 1e-20), experts, valid)
        routing = self.route(gating, weights * self.scale, rng=rng)
        if rng is not None:
            alpha = take(left, best[..., -1:])
            found, weight = quantiles(by - alpha, valid, self.top_k / self.num_experts)
            total = state.total + jnp.sum(found * weight, axis=0)
            state = QuantileState(state.beta, total, state.tokens + routing.stats.tokens)
        return dataclasses.replace(routing, state=state)


def quantiles(
    margins: Float[Array, "g s e"], valid: Bool[Array, "g s"], share: float
) -> tuple[Float[Array, "g e"], Float[Array, "g 1"]]:
    """What ``share`` of a group's real tokens exceed at each expert, 0 in a group of padding; and their number. Linear
    between neighbours."""
    ordered = -jnp.sort(jnp.where(valid[..., None], -margins, jnp.inf), axis=1)
    tokens = valid.sum(1, keepdims=True).astype(jnp.float32)
    place = tokens * share
    low = jnp.floor(place)
    number = jnp.arange(margins.shape[1], dtype=jnp.float32)

    def at(place: Float[Array, "g 1"]) -> Float[Array, "g e"]:
        here = (number == place) & valid.any(1, keepdims=True)
        return jnp.sum(jnp.where(here[..., None], ordered, 0.0), axis=1)

    above, below = at(low), at(jnp.minimum(low + 1, tokens - 1))
    return above + (place - low) * (below - above), tokens
