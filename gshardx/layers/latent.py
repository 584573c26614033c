"""Multi-head latent attention: keys and values of all heads from one narrow vector a token, which is all that is kept.

DeepSeek-V2, arXiv 2405.04434 section 2.1 (appendix C has the formulas). With x a token, n heads, and norms RMS:

    q = norm(x W_qa) W_qb, or x W_q                        q = [q^nope; q^rope] of each head, the latter turned
    c = norm(x W_c), k^rope = x W_kr turned                W_kva = [W_c W_kr]; one k^rope for all heads
    k = [c W_uk; k^rope], v = c W_uv                       W_kvb = [W_uk W_uv]
    out = softmax(scale q k^T) v W_o

Where keys are kept, c and k^rope are, and the heads are never made: q^nope k^nope^T = (q^nope W_uk^T) c^T and
p (c W_uv) = (p c) W_uv, so a query goes into the latent space instead, and what it finds there comes out (section
2.1.2, "absorbed").
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.memory import Kept, Memory
from gshardx.layers.norm import RMSNorm
from gshardx.layers.param import fan_in_normal, param
from gshardx.layers.rope import Rope, rotate
from gshardx.sharding import shard


def check_latent(*, q_rank: int | None, kv_rank: int, rope_dim: int, nope_dim: int, value_dim: int) -> None:
    """Raise BadInput unless all are above 0, and ``rope_dim`` is even."""
    sizes = {"q_rank": q_rank, "kv_rank": kv_rank, "rope_dim": rope_dim, "nope_dim": nope_dim, "value_dim": value_dim}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise BadInput(f"{name} = {size}: must be above 0")
    if rope_dim % 2:
        raise BadInput(f"rope_dim = {rope_dim}: rotary positions turn pairs; use {rope_dim + 1}")


class LatentAttention(nnx.Module):
    """``[b, t, m] -> [b, t, m]`` with n heads whose keys and values are made from one latent vector.

    Args:
        width: m.
        heads: n.
        q_rank: width that queries are compressed to; None: they are not (DeepSeek-V2-Lite).
        kv_rank: r, width of the latent vector of keys and values.
        rope_dim: width of the part of queries and keys that turns, even.
        nope_dim: width of the part that does not.
        value_dim: width of a head's values.
        rope: how positions turn.
        output_scale: factor on the output projection's initial values.
        biases: adds biases to both compressions and the output.
        latent_epsilon: added to the mean square by the two norms of compressed vectors.
        scale: factor on the scores; None: ``(nope_dim + rope_dim)**-0.5``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_rank: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        q_rank: int | None = None,
        rngs: nnx.Rngs,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
        output_scale: float = 1.0,
        biases: bool = False,
        latent_epsilon: float = 1e-6,
        scale: float | None = None,
    ) -> None:
        check_latent(q_rank=q_rank, kv_rank=kv_rank, rope_dim=rope_dim, nope_dim=nope_dim, value_dim=value_dim)
        rope.frequencies(rope_dim)  # or say what does not fit
        self.rope, self.kv_rank, self.nope_dim = rope, kv_rank, nope_dim
        self.heads, self.kept = heads, Kept(1, kv_rank + rope_dim, kv_rank)
        self.scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale

        def matrix(axes: str, *shape: int) -> nnx.Param[Array]:
            return param(rngs.params(), axes, shape, fan_in_normal(shape[0]))

        def bias(axes: str, size: int, wanted: bool) -> nnx.Param[Array] | None:
            return param(rngs.params(), axes, (size,), jax.nn.initializers.zeros) if wanted else None

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, "latent", rngs=rngs, epsilon=latent_epsilon)

        key_dim, compressed = nope_dim + rope_dim, q_rank is not None
        if q_rank is None:
            self.w_q = matrix("embed heads head_dim", width, heads, key_dim)
        else:
            self.w_q_a, self.q_norm = matrix("embed latent", width, q_rank), norm(q_rank)
            self.w_q_b = matrix("embed heads head_dim", q_rank, heads, key_dim)
        self.compressed = compressed
        self.w_kv_a, self.kv_norm = matrix("embed latent", width, kv_rank + rope_dim), norm(kv_rank)
        self.w_kv_b = matrix("embed heads head_dim", kv_rank, heads, nope_dim + value_dim)
        init = fan_in_normal(heads * value_dim, output_scale)
        self.w_o = param(rngs.params(), "heads head_dim embed", (heads, value_dim, width), init)
        self.b_q_a = bias("latent", q_rank or 0, biases and compressed)
        self.b_kv_a = bias("latent", kv_rank + rope_dim, biases)
        self.b_o = bias("model", width, biases)

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        memory: Memory,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "b t m"], Memory]:
        """Attend from each token to what ``memory`` lets it see; return the output and the extended memory."""
        with jax.named_scope("attention"):
            nope, turned = jnp.split(self._queries(x), [self.nope_dim], axis=-1)
            turned = shard(rotate(turned, positions, self.rope), "batch time heads head_dim")
            latent, key = jnp.split(_plus(_project(x, self.w_kv_a), self.b_kv_a), [self.kv_rank], axis=-1)
            latent = shard(self.kv_norm(latent), "batch time latent")
            key = rotate(key[:, :, None], positions, self.rope)
            attend = self._absorbed if memory.KEEPS else self._expanded
            heads, memory = attend(nope, turned, latent, key, memory, layer)
            out = jnp.einsum("btnc,ncm->btm", heads, self.w_o[...].astype(x.dtype))
            return shard(_plus(out, self.b_o), "batch time model"), memory

    def _queries(self, x: Float[Array, "b t m"]) -> Float[Array, "b t n d"]:
        if self.compressed:
            latent = shard(self.q_norm(_plus(_project(x, self.w_q_a), self.b_q_a)), "batch time latent")
            q = jnp.einsum("btr,rnd->btnd", latent, self.w_q_b[...].astype(x.dtype))
        else:
            q = jnp.einsum("btm,mnd->btnd", x, self.w_q[...].astype(x.dtype))
        return shard(q, "batch time heads head_dim")

    def _expanded(
        self,
        nope: Float[Array, "b t n d"],
        turned: Float[Array, "b t n p"],
        latent: Float[Array, "b t r"],
        key: Float[Array, "b t 1 p"],
        memory: Memory,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "b t n c"], Memory]:
        """Every head has keys and values of its own."""
        made = jnp.einsum("btr,rnd->btnd", latent, self.w_kv_b[...].astype(latent.dtype))
        k, v = jnp.split(shard(made, "batch time heads head_dim"), [self.nope_dim], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(key, turned.shape)], axis=-1)
        q = jnp.concatenate([nope, turned], axis=-1)
        return memory.attend(layer, self._scaled(q), k, v)

    def _absorbed(
        self,
        nope: Float[Array, "b t n d"],
        turned: Float[Array, "b t n p"],
        latent: Float[Array, "b t r"],
        key: Float[Array, "b t 1 p"],
        memory: Memory,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "b t n c"], Memory]:
        """All heads share one key, whose first entries are the values."""
        w = shard(self.w_kv_b[...].astype(latent.dtype), "latent heads head_dim")
        up_k, up_v = jnp.split(w, [self.nope_dim], axis=-1)
        q = jnp.concatenate([jnp.einsum("btnd,rnd->btnr", nope, up_k), turned], axis=-1)
        k = jnp.concatenate([latent[:, :, None], key], axis=-1)
        found, memory = memory.attend(layer, self._scaled(q), k, self.kv_rank)
        return jnp.einsum("btnr,rnc->btnc", found, up_v), memory

    def _scaled(self, q: Float[Array, "b t n d"]) -> Float[Array, "b t n d"]:
        """Memories divide scores by sqrt(d)."""
        factor = self.scale * q.shape[-1] ** 0.5
        return shard(q if factor == 1 else q * factor, "batch time heads head_dim")


def _project(x: Float[Array, "b t m"], w: nnx.Param[Array]) -> Float[Array, "b t r"]:
    # Whole: else the partitioner splits it over ``tensor`` where there is fsdp too, and moves it twice.
    return jnp.einsum("btm,mr->btr", x, shard(w[...].astype(x.dtype), "model latent"))


def _plus(x: Float[Array, "*b d"], bias: nnx.Param[Array] | None) -> Float[Array, "*b d"]:
    return x if bias is None else x + bias[...].astype(x.dtype)
