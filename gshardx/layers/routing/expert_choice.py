"""Expert choice (Zhou et al., arXiv 2202.09368): each expert takes its best tokens, as many as every other expert.

    p = softmax(x W) over experts                         fp32
    chosen by expert e: the C largest p_te of the group's real tokens;  C = factor * k * s / E
    weight of t at e: p_te, chosen or not in how many others

A token may go to any number of experts, none included. With ``most`` set, to about that many at most: tokens are then
taken by A instead of p, which maximises ``<p, A> + smoothness H(A)`` where each expert has C tokens in all, each token
``most`` experts at most, and no entry exceeds 1 (the paper's section 3.3).

Who is chosen depends on the whole group, so later tokens decide about earlier ones: a decoder learns from what it is to
predict, and can't be served. flaxformer forbids it there; SonicMoE (arXiv 2512.14080) reports a gap of 3 and more
between perplexities in training and in use.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import Capacity
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


class ExpertChoiceRouter(LinearRouter):
    """Every token has one choice of each expert, ``k`` of which are taken on average. Args, beside those of
    :class:`LinearRouter`, whose capacity holds without an rng too:

    most: experts that a token goes to, at most, in so far as whole tokens allow it; None: no limit.
    smoothness: lambda of A, 0.001 in the paper.
    iterations: Dykstra's steps towards A; the paper's 100 stop short of it, so that some tokens go to more.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        most: int | None = None,
        smoothness: float = 0.001,
        iterations: int = 100,
        capacity: Capacity = Capacity(1.0),  # noqa: B008 (frozen)
        **common: Any,
    ) -> None:
        if capacity.factor is None:
            raise BadInput(
                "expert_choice needs a capacity: with room for all, every expert takes every token; use a factor of 1.0"
            )
        if most is not None and most < top_k * capacity.factor:
            taken = top_k * capacity.factor
            raise BadInput(f"most = {most}: experts take {taken:g} times the tokens; use {math.ceil(taken)} or more")
        factor = capacity.factor * top_k / num_experts  # of the choices, which are all experts
        always = dataclasses.replace(capacity, factor=factor, evaluation=factor)
        super().__init__(width, num_experts, top_k, capacity=always, **common)
        self.most, self.smoothness, self.iterations = most, smoothness, iterations

    @property
    def leak(self) -> str | None:
        return "experts choose among all tokens of a row, later ones too"

    def choices(self, training: bool) -> int:
        return self.num_experts

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        count = self.capacity.slots(tokens.shape[1], self.num_experts, self.num_experts, training=True)
        wishes = jnp.log(gates)
        if self.most is not None:
            wishes = capped(gates / self.smoothness, valid, count, self.most, self.iterations)
        chosen = best_tokens(jnp.where(valid[..., None], wishes, -jnp.inf), count) & valid[..., None]
        experts = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gates.shape)
        gating = Gating(logits, gates, experts, valid)
        return self.route(gating, gates, rng=rng, wanted=chosen)


def best_tokens(wishes: Float[Array, "g s e"], count: int) -> Bool[Array, "g s e"]:
    """True for the ``count`` largest of each expert in each group; of equals, earlier tokens."""
    order = jnp.argsort(-jax.lax.stop_gradient(wishes), axis=1, stable=True)
    return jnp.argsort(order, axis=1) < count


def capped(
    start: Float[Array, "g s e"], valid: Bool[Array, "g s"], count: int, most: int, iterations: int
) -> Float[Array, "g s e"]:
    """log A, by Dykstra's projections in logarithms: of the experts' sums, the tokens' sums, and the entries.

    Entries that the last projection cut to log 1 have back what it cut off: rounding would choose among equals.
    """
    start = jnp.where(valid[..., None], jax.lax.stop_gradient(start), -jnp.inf)
    total = jnp.log(jnp.minimum(count, valid.sum(1))[:, None, None].astype(jnp.float32))

    def step(_: int, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        plan, token_debt, entry_debt = carried
        plan = plan + total - _total(plan, axis=1)
        wide = plan + token_debt
        plan = wide + jnp.minimum(0.0, jnp.log(most) - _total(wide, axis=2))
        token_debt = jnp.where(valid[..., None], wide - plan, 0.0)
        wide = plan + entry_debt
        plan = jnp.minimum(wide, 0.0)
        return plan, token_debt, jnp.where(valid[..., None], wide - plan, 0.0)

    nothing = jnp.zeros_like(start)
    plan, _, cut_off = jax.lax.fori_loop(0, iterations, step, (start, nothing, nothing))
    return plan + cut_off


def _total(plan: Float[Array, "g s e"], axis: int) -> Float[Array, "g s e"]:
    """Log of the sum along ``axis``; 0 where nothing is there."""
    total = jax.nn.logsumexp(plan, axis=axis, keepdims=True)
    return jnp.where(jnp.isneginf(total), 0.0, total)
