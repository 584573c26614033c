"""Grouped-query attention (arXiv 2305.13245) with rotary positions over an explicit memory."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.layers.memory import Memory
from gshardx.layers.param import fan_in_normal, param
from gshardx.layers.rope import rotate
from gshardx.sharding import shard


class Attention(nnx.Module):
    """``[b, t, m] -> [b, t, m]`` with n query heads that share q key and value heads of width d.

    Args:
        width: m.
        heads: n; a multiple of ``kv_heads``.
        kv_heads: q.
        head_dim: d, even.
        rope_base: slowest rotation's base.
        output_scale: factor on the output projection's initial values.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        rope_base: float = 10_000.0,
        output_scale: float = 1.0,
    ) -> None:
        init = fan_in_normal(width)
        self.w_q = param(rngs.params(), "embed heads head_dim", (width, heads, head_dim), init)
        self.w_k = param(rngs.params(), "embed kv_heads head_dim", (width, kv_heads, head_dim), init)
        self.w_v = param(rngs.params(), "embed kv_heads head_dim", (width, kv_heads, head_dim), init)
        self.w_o = param(
            rngs.params(),
            "heads head_dim embed",
            (heads, head_dim, width),
            fan_in_normal(heads * head_dim, output_scale),
        )
        self.rope_base = rope_base

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        memory: Memory,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "b t m"], Memory]:
        """Attend from each token to what ``memory`` lets it see; return the output and the extended memory."""
        with jax.named_scope("attention"):
            dtype = x.dtype
            q = jnp.einsum("btm,mnd->btnd", x, self.w_q[...].astype(dtype))
            k = jnp.einsum("btm,mqd->btqd", x, self.w_k[...].astype(dtype))
            v = jnp.einsum("btm,mqd->btqd", x, self.w_v[...].astype(dtype))
            q = shard(rotate(q, positions, self.rope_base), "batch time heads head_dim")
            k = shard(rotate(k, positions, self.rope_base), "batch time kv_heads head_dim")
            heads, memory = memory.attend(layer, q, k, shard(v, "batch time kv_heads head_dim"))
            out = jnp.einsum("btnd,ndm->btm", heads, self.w_o[...].astype(dtype))
            return shard(out, "batch time model"), memory
