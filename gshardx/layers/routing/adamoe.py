"""AdaMoE (arXiv 2406.13233): null experts, which do nothing, so that a token decides how many true ones it needs.

    g = softmax([x W, x N])                               fp32, over e true and n null experts
    chosen: the k largest, k larger than without nulls
    w_i = g_i / sum of the g of the chosen true experts   0 if all are null: the output is exactly 0
    balance = (e + n) sum_i f_i g_i                       a null's f is the mean of all nulls' f

So the loss wants n / (e + n) of all choices to be null, and does not care whose they are or which token's. A null
choice takes no slot and no row; its id is ``num_experts`` or more. Each null has its own column: with one for all, a
token could have only one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.param import param
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


class AdaMoERouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (bias is of the true experts):

    null_experts: n; None: as many as true ones.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        null_experts: int | None = None,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        if null_experts == 0:
            raise BadInput("null_experts = 0: that is top_k's choice; use the router top_k, or 1 or more")
        super().__init__(width, num_experts, top_k, rngs=rngs, **common)
        shape = width, null_experts or num_experts
        self.nulls = param(rngs.params(), "embed router", shape, jax.nn.initializers.normal(0.02))

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e_and_n"]:
        return jnp.concatenate([super().logits(tokens), self.product(tokens, self.nulls)], axis=-1)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        experts = top_k(logits, self.top_k)
        true = experts < self.num_experts
        gating = Gating(logits, gates, experts, valid)
        # Of a product it does not matter which factor is averaged over the nulls: f, as in the paper, or g.
        own, nulls = jnp.split(gates, [self.num_experts], axis=-1)
        alike = jnp.broadcast_to(nulls.mean(-1, keepdims=True), nulls.shape)
        return self.route(
            gating,
            softmax_over(take(logits, experts), true),
            rng=rng,
            judged=gating._replace(gates=jnp.concatenate([own, alike], axis=-1)),
            wanted=true & valid[..., None],
        )


def softmax_over(logits: Float[Array, "g s k"], among: Bool[Array, "g s k"]) -> Float[Array, "g s k"]:
    """0 outside ``among``, and everywhere where that is empty."""
    largest = jax.lax.stop_gradient(jnp.where(among, logits, -jnp.inf).max(-1, keepdims=True))
    powers = jnp.where(among, jnp.exp(jnp.where(among, logits - largest, 0.0)), 0.0)
    return powers / jnp.where(among.any(-1, keepdims=True), powers.sum(-1, keepdims=True), 1.0)
