"""Token embedding and its inverse."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.layers.param import fan_in_normal, param
from gshardx.sharding import shard


class Embedding(nnx.Module):
    """A table ``[v, m]``."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.table = param(rngs.params(), "vocab embed", (vocab, width), jax.nn.initializers.normal(1.0))

    def __call__(self, tokens: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t m"]:
        # In whole rows: split along m, the gradient of this lookup would fall back to replication.
        table = shard(self.table[...].astype(dtype), "vocab model")
        return shard(table[tokens], "batch time model")

    def scores(self, x: Float[Array, "b t m"], scale: float | None = None) -> Float[Array, "b t v"]:
        """Tied logits, fp32: ``scale x table^T``; by default ``1 / sqrt(m)``, so that they are of unit scale as the
        table's entries are (T5 scales alike)."""
        table = shard(self.table[...].astype(x.dtype), "vocab model")
        return shard(project(x * (x.shape[-1] ** -0.5 if scale is None else scale), table.T), "batch time vocab")


class Unembedding(nnx.Module):
    """Logits ``[b, t, v]`` in fp32 from ``[b, t, m]``."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = param(rngs.params(), "embed vocab", (width, vocab), fan_in_normal(width))

    def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        return shard(project(x, self.kernel[...].astype(x.dtype)), "batch time vocab")


@jax.custom_vjp
def project(x: Float[Array, "b t m"], w: Float[Array, "m v"]) -> Float[Array, "b t v"]:
    """``x w`` in fp32.

    The gradient is written out so that the large ``[b, t, v]`` factor of w's is read in the order it has in memory;
    autodiff puts it first, and XLA's CPU compiler then transposes it (jax 0.10).
    """
    return jnp.einsum("btm,mv->btv", x, w, preferred_element_type=jnp.float32)


def _project_backward(saved: tuple[Array, Array], gradient: Float[Array, "b t v"]) -> tuple[Any, Any]:
    x, w = saved
    gradient = jax.lax.optimization_barrier(gradient.astype(x.dtype))
    return jnp.einsum("btv,mv->btm", gradient, w), jnp.einsum("btm,btv->mv", x, gradient)


project.defvjp(lambda x, w: (project(x, w), (x, w)), _project_backward)
