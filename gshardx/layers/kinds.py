"""Experts that are computed where the token is: nothing is sent for them, and next to nothing computed (MoE++, arXiv
2410.07348, section 3.1).

    zero        0
    copy        x
    constant j  a_1 x + a_2 v_j                           [a_1, a_2] = softmax(x W_j), v_j learned; fp32
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gshardx.layers.param import param
from gshardx.layers.routing import MoePlusPlusRouter, Router
from gshardx.sharding import shard


class Kinds(nnx.Module):
    """The weighted sum of each token's: ``([g, s, m], weights [g, s, z]) -> [g, s, m]``.

    Args:
        width: m.
        zero, copy, constant: how many of each; z in all, in this order.
    """

    def __init__(self, width: int, zero: int, copy: int, constant: int, *, rngs: nnx.Rngs) -> None:
        self.ends = zero, zero + copy
        shapes = (width, 2 * constant), (constant, width)
        init = jax.nn.initializers.normal
        self.shares = param(rngs.params(), "embed router", shapes[0], init(0.02)) if constant else None
        # N(0, 1), as in the authors' code: of the size of what a norm lets through.
        self.values = param(rngs.params(), "router embed", shapes[1], init(1.0)) if constant else None

    def __call__(self, tokens: Float[Array, "g s m"], weights: Float[Array, "g s z"]) -> Float[Array, "g s m"]:
        x = tokens.astype(jnp.float32)
        _, copies, constants = jnp.split(weights, self.ends, axis=-1)
        of_x = copies.sum(-1)
        added: Array | float = 0.0
        if self.shares is not None and self.values is not None:
            logits = jnp.einsum("gsm,mz->gsz", x, shard(self.shares[...], "model router"))
            parts = constants[..., None] * jax.nn.softmax(logits.reshape(*constants.shape, 2), axis=-1)
            of_x += parts[..., 0].sum(-1)
            added = jnp.einsum("gsz,zm->gsm", parts[..., 1], shard(self.values[...], "router model"))
        return shard((of_x[..., None] * x + added).astype(tokens.dtype), "group token model")


def kinds_of(router: Router, width: int, *, rngs: nnx.Rngs) -> Kinds | None:
    """Those that ``router`` has beside the experts; None: it has no others."""
    return Kinds(width, *router.kinds, rngs=rngs) if isinstance(router, MoePlusPlusRouter) else None
