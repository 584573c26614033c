"""MoE++ (arXiv 2410.07348): zero, copy and constant experts beside the feed-forward ones, for tokens that need little.

    g = softmax([x W, x N])                               fp32, over e feed-forward and z local experts
    chosen: the k largest;  w_i = g_i
    balance = D sum_i eta_i f_i g_i                       eta: 1 of feed-forward experts, tau of local ones
    slots of a feed-forward expert: factor tau k s / (tau e + z)

The loss is least where a local expert has 1 / tau times the choices of a feed-forward one; D = e + z / tau makes it 1
there. A local choice takes no slot and no row: what it adds is computed where the token is (layers/kinds.py), from
``Routing.local``; its id is ``num_experts`` or more, in the order zero, copy, constant.

Not here: the paper's gate residual, which adds a product with the logits of the MoE layer before.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.param import param
from gshardx.layers.routing.adamoe import softmax_over
from gshardx.layers.routing.choice import Capacity, take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


class MoePlusPlusRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (bias is of the feed-forward experts):

    zero, copy, constant: how many local experts of each kind.
    tau: of a local expert's share of the choices, what a feed-forward expert is to have.
    renormalise: divide the weights by their sum, in which a zero expert's counts as 0 (the authors' code, which then
        multiplies by k; the paper does neither).
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        tau: float = 0.75,
        renormalise: bool = False,
        capacity: Capacity = Capacity(),  # noqa: B008 (frozen)
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        local = zero + copy + constant
        if local == 0:
            raise BadInput("zero, copy and constant = 0: that is top_k's choice; use the router top_k, or 1 or more")
        if tau <= 0:
            raise BadInput(f"tau = {tau}: must be above 0; the paper has 0.75")
        share = tau * num_experts / (tau * num_experts + local)
        factors = (None if x is None else x * share for x in (capacity.factor, capacity.evaluation))
        capacity = dataclasses.replace(capacity, factor=next(factors), evaluation=next(factors))
        super().__init__(width, num_experts, top_k, capacity=capacity, rngs=rngs, **common)
        self.kinds, self.tau, self.renormalise = (zero, copy, constant), tau, renormalise
        self.local = param(rngs.params(), "embed router", (width, local), jax.nn.initializers.normal(0.02))

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e_and_z"]:
        return jnp.concatenate([super().logits(tokens), self.product(tokens, self.local)], axis=-1)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        experts = top_k(logits, self.top_k)
        weights = take(gates, experts)
        e, z = self.num_experts, sum(self.kinds)
        if self.renormalise:
            zero = (experts >= e) & (experts < e + self.kinds[0])
            weights = softmax_over(take(logits, experts), ~zero)
        pressure = jnp.where(jnp.arange(e + z) < e, 1.0, self.tau) * ((e + z / self.tau) / (e + z))
        gating = Gating(logits, gates, experts, valid)
        routing = self.route(
            gating,
            weights,
            rng=rng,
            judged=gating._replace(gates=gates * pressure),
            wanted=(experts < e) & valid[..., None],
        )
        here = (experts[..., None] == jnp.arange(e, e + z)) & valid[..., None, None]
        return dataclasses.replace(routing, local=jnp.where(here, weights[..., None], 0.0).sum(-2))
