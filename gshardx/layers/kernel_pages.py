"""Paged attention by the accelerators' own kernels, and pages as these want them.

JAX has a Pallas kernel for TPUs and one for GPUs with the same arguments: for each query the pages of its sequence and
how many tokens of them to see. A token of a prompt is a query like any other, one position shorter than the next.
:func:`gshardx.layers.paged.paged_attention` is their twin. Compiled for v5e, v6e and H100 and interpreted in tests; not
run on a chip yet, so an engine uses them only where it is told to.
"""

import contextlib
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelPages:
    """In the dtype of the arrays, head after head; what is not finite is stored as 0.

    The kernels weigh tokens after a query's own by 0, and 0 times NaN is NaN: a sequence whose numbers went bad would
    spoil the one that has its pages next. The price is that a prompt whose numbers go bad before its last token goes on
    unnoticed.
    """

    k: Float[Array, "q p l d"]
    v: Float[Array, "q p l d"]
    platform: str = dataclasses.field(metadata={"static": True})
    """Whose kernel reads them: "tpu" or "gpu"."""

    AXES: ClassVar[str] = "batch kv_heads slot time head_dim"

    @property
    def shape(self) -> tuple[int, ...]:
        heads, pages, size, width = self.v.shape
        return pages, heads, size, width

    def put(
        self, page: Int[Array, "t"], place: Int[Array, "t"], k: Float[Array, "t q d"], v: Float[Array, "t q d"]
    ) -> "KernelPages":
        new_k, new_v = (_stored(pages, page, place, new) for pages, new in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, k=new_k, v=new_v)

    def read(self, page: Int[Array, "t"]) -> tuple[Float[Array, "t q d l"], Float[Array, "t q l d"]]:
        k, v = (jnp.moveaxis(pages[:, page], 1, 0).astype(jnp.float32) for pages in (self.k, self.v))
        return k.swapaxes(2, 3), v


def _stored(
    pages: Float[Array, "q p l d"], page: Int[Array, "t"], place: Int[Array, "t"], new: Float[Array, "t q d"]
) -> Float[Array, "q p l d"]:
    new = new.astype(pages.dtype)
    return pages.at[:, page, place].set(jnp.where(jnp.isfinite(new), new, 0).swapaxes(0, 1))


def has_kernel(platform: str, dtype: str, page_size: int, head_dim: int) -> bool:
    """Whether a platform has a kernel for such pages; how large they may be its compiler knows."""
    if dtype != "bfloat16":  # of float32 both kernels multiply fewer bits than the twin
        return False
    if platform == "tpu":
        return head_dim % 128 == 0 and page_size % 16 == 0
    return platform == "gpu" and all(x >= 16 and x & (x - 1) == 0 for x in (page_size, head_dim))


def kernel_attention(
    q: Float[Array, "t n d"],
    pool: KernelPages,
    table: Int[Array, "t pages"],
    positions: Int[Array, "t"],
    *,
    interpret: bool = False,
) -> Float[Array, "t n d"]:
    """As :func:`gshardx.layers.paged.paged_attention`, without reach and sinks, on a platform with such a kernel.

    Args:
        q: n query heads share the pool's heads; of the pool's dtype.
        pool: pages.
        table: pages of each token's sequence.
        positions: of each token; -1: padding, whose result means nothing.
        interpret: compute it with JAX's interpreter, on any platform.
    """
    lengths = jnp.maximum(positions, 0).astype(jnp.int32) + 1
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    together = math.gcd(table.shape[1], 8 if pool.platform == "tpu" else 2)  # pages at a time
    if pool.platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as on_tpu

        with pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
            out = on_tpu(scaled, pool.k, pool.v, lengths, table, pages_per_compute_block=together)
    else:
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as on_gpu

        options = {"pages_per_compute_block": together, "k_splits": 1, "interpret": interpret}
        out = on_gpu(scaled, pool.k, pool.v, table, lengths, **options)
    found: Array = out
    return found
