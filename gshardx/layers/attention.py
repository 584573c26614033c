"""Grouped-query attention (arXiv 2305.13245) with rotary positions over an explicit memory."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.memory import Kept, Memory
from gshardx.layers.norm import RMSNorm
from gshardx.layers.param import fan_in_normal, param
from gshardx.layers.reach import Reach
from gshardx.layers.rope import Rope, rotate
from gshardx.sharding import shard

Biases = Literal["none", "qkv", "qkvo"]
HeadNorm = Literal["none", "head", "whole", "l2"]


class Attention(nnx.Module):
    """``[b, t, m] -> [b, t, m]`` with n query heads that share q key and value heads of width d.

    Args:
        width: m.
        heads: n; a multiple of ``kv_heads``.
        kv_heads: q.
        head_dim: d, even.
        rope: how positions turn queries and keys.
        output_scale: factor on the output projection's initial values.
        biases: of queries, keys and values (Qwen2), and of the output too.
        qk_norm: RMS norm of queries and keys before they are turned: of each head (Qwen3), or of all heads as one
            vector (OLMoE); l2: of each head after it was turned, with nothing learned (Llama 4).
        norm_epsilon: of these norms.
        qkv_clip: bound of queries, keys and values in absolute value, after the norms; None: none.
        scale: factor on the scores; None: ``d**-0.5``.
        window, chunk, full_every: what each layer sees, as :class:`gshardx.layers.reach.Reach` says.
        sinks: a learned logit a head beside the scores, which takes weight and gives nothing (GPT-OSS).
        nope: layers that see everything turn nothing, and have no l2 norm (arXiv 2305.19466; Llama 4).
        temperature_floor: f; in layers that see everything, queries at position p grow by ``1 + temperature_scale
            log(1 + floor((p + 1) / f))`` (arXiv 2501.19399; Llama 4); None: they don't.
        temperature_scale: see there.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
        output_scale: float = 1.0,
        biases: Biases = "none",
        qk_norm: HeadNorm = "none",
        norm_epsilon: float = 1e-6,
        qkv_clip: float | None = None,
        scale: float | None = None,
        window: int | None = None,
        chunk: int | None = None,
        full_every: int | None = None,
        sinks: bool = False,
        nope: bool = False,
        temperature_floor: int | None = None,
        temperature_scale: float = 0.1,
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
        rope.frequencies(head_dim)  # or say what does not fit
        self.rope, self.qkv_clip = rope, qkv_clip
        self.query_scale = None if scale is None else scale * head_dim**0.5
        by_head = (("heads", heads), ("kv_heads", kv_heads), ("kv_heads", kv_heads))
        self.b_q, self.b_k, self.b_v = (
            _bias(rngs, f"{axis} head_dim", (count, head_dim), biases != "none") for axis, count in by_head
        )
        self.b_o = _bias(rngs, "model", (width,), biases == "qkvo")
        self.q_norm, self.k_norm = (
            _head_norm(qk_norm, axis, (count, head_dim), norm_epsilon, rngs) for axis, count in by_head[:2]
        )
        self.sinks = param(rngs.params(), "heads", (heads,), jax.nn.initializers.zeros) if sinks else None
        self.reach, self.nope = Reach(window, chunk, full_every), nope
        self.heads, self.kept = heads, Kept(kv_heads, head_dim)
        self.l2_epsilon = norm_epsilon if qk_norm == "l2" else None
        self.temperature_floor, self.temperature_scale = temperature_floor, temperature_scale

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
            q = _biased(jnp.einsum("btm,mnd->btnd", x, self.w_q[...].astype(dtype)), self.b_q)
            k = _biased(jnp.einsum("btm,mqd->btqd", x, self.w_k[...].astype(dtype)), self.b_k)
            v = _biased(jnp.einsum("btm,mqd->btqd", x, self.w_v[...].astype(dtype)), self.b_v)
            q, k = (y if norm is None else norm(y) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
            if self.qkv_clip is not None:
                q, k, v = (jnp.clip(y, -self.qkv_clip, self.qkv_clip) for y in (q, k, v))
            full = self.reach.full(layer)
            q = self._tempered(self._turned(q, positions, full), positions, full)
            if self.query_scale is not None:  # memories divide scores by sqrt(d); a norm would undo it before
                q = q * self.query_scale
            q = shard(q, "batch time heads head_dim")
            k = shard(self._turned(k, positions, full), "batch time kv_heads head_dim")
            sinks = None if self.sinks is None else self.sinks[...]
            v, reach = shard(v, "batch time kv_heads head_dim"), self.reach.of(layer, positions)
            heads, memory = memory.attend(layer, q, k, v, reach=reach, sinks=sinks)
            out = _biased(jnp.einsum("btnd,ndm->btm", heads, self.w_o[...].astype(dtype)), self.b_o)
            return shard(out, "batch time model"), memory

    def _turned(
        self, x: Float[Array, "b t n d"], positions: Int[Array, "b t"], full: bool | Bool[Array, ""]
    ) -> Float[Array, "b t n d"]:
        """Queries or keys with their positions."""
        if self.nope and full is True:
            return x
        turned = rotate(x, positions, self.rope)
        if self.l2_epsilon is not None:
            x32 = turned.astype(jnp.float32)
            mean = jnp.mean(x32 * x32, -1, keepdims=True)
            turned = (x32 * jax.lax.rsqrt(mean + self.l2_epsilon)).astype(x.dtype)
        return jnp.where(full, x, turned) if self.nope and full is not False else turned

    def _tempered(
        self, q: Float[Array, "b t n d"], positions: Int[Array, "b t"], full: bool | Bool[Array, ""]
    ) -> Float[Array, "b t n d"]:
        if self.temperature_floor is None or full is False:
            return q
        grown = jnp.log1p(jnp.floor((positions + 1) / self.temperature_floor)) * self.temperature_scale + 1.0
        return (q * jnp.where(full, grown, 1.0)[:, :, None, None]).astype(q.dtype)


def _bias(rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], wanted: bool) -> nnx.Param[Array] | None:
    return param(rngs.params(), axes, shape, jax.nn.initializers.zeros) if wanted else None


def _biased(x: Float[Array, "*b d"], bias: nnx.Param[Array] | None) -> Float[Array, "*b d"]:
    return x if bias is None else x + bias[...].astype(x.dtype)


def _head_norm(over: HeadNorm, axis: str, shape: tuple[int, int], epsilon: float, rngs: nnx.Rngs) -> RMSNorm | None:
    """Of ``[b, t, heads, d]``; ``shape``: heads and d."""
    if over in ("none", "l2"):
        return None
    width, axes = (shape, f"{axis} head_dim") if over == "whole" else (shape[1], "head_dim")
    return RMSNorm(width, axes, rngs=rngs, epsilon=epsilon)
