"""Task-level routing (Task-MoE; Kudugunta et al., arXiv 2110.03742): experts are chosen for a document's task.

    z = row of its task in a learned table [n + 1, e]     fp32; the last row is for documents without a tag
    p = softmax(z) over experts;  chosen: the k largest;  w = p over their sum

A document's task is that of its tag: a token such as the target language's in translation. All documents of a task use
the same k experts, whatever is in them, so one task needs no others to be served. The tag counts from where it stands.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.param import param
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.tags import Tagged
from gshardx.layers.routing.top_k import TopKRouter


class TaskRouter(Tagged, TopKRouter):
    """Args, beside those of :class:`TopKRouter`:

    width: m; not looked at.
    tags: the tasks' tokens, by id.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        tags: list[int] | None = None,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        Tagged.__init__(self, tags)
        rows = len(self.tags) + 1
        TopKRouter.__init__(self, rows, num_experts, top_k, rngs=rngs, **common)
        # Not 0.02: a task has one row, which no token's size multiplies, and with it its experts from the start.
        self.kernel = param(rngs.params(), "model router", (rows, num_experts), jax.nn.initializers.normal(1.0))

    def __call__(
        self,
        tokens: Float[Array, "g s m"],
        valid: Bool[Array, "g s"],
        rng: Array | None,
        state: RouterState = (),
        *,
        ids: Int[Array, "g s"] | None = None,
        recalled: Float[Array, "g s n"] | None = None,
    ) -> Routing:
        task = jax.nn.one_hot(self.seen(ids, recalled, valid), len(self.tags) + 1, dtype=jnp.float32)
        return self.choose(self.logits(task), valid, rng)
