"""Hash layers (Roller et al., arXiv 2106.04426): a token's id names its experts; nothing is learned.

    plain:     expert = h(id)                              h a fixed random function; weight 1
    balanced:  ids from the most to the least frequent, each to the expert that has least so far
    multiple:  k functions, each with e / k experts of its own; outputs are added (MultiHash)

An expert of h hidden units cut into k parts, each under a function of its own, is k experts of h / k units.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.common import RouterBase
from gshardx.layers.routing.contract import RouterState, Routing


class HashRouter(RouterBase):
    """Args, beside those of :class:`RouterBase`:

    width: m; not looked at.
    seed: of the hash functions.
    counts: how often each id occurs, from id 0; others never. Balances the one function of top_k = 1.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        seed: int = 0,
        counts: list[int] | None = None,
        rngs: Any = None,
        **common: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        if num_experts % top_k:
            raise BadInput(f"top_k = {top_k} hash functions do not share num_experts = {num_experts}; use a divisor")
        if counts is not None and top_k != 1:
            raise BadInput(f"counts balance one hash function, but top_k = {top_k}; use top_k 1")
        self.seed = seed
        # As bytes, which hash, as all that is static in a compiled program must.
        self.table = None if counts is None else balanced(counts, num_experts).tobytes()

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Any = None) -> Any:
        return self if ids is None else partial(self, ids=ids)

    def __call__(
        self,
        tokens: Float[Array, "g s m"],
        valid: Bool[Array, "g s"],
        rng: Array | None,
        state: RouterState = (),
        *,
        ids: Int[Array, "g s"] | None = None,
    ) -> Routing:
        if ids is None:
            raise BadInput("router hash goes by the tokens' ids; give the layer its argument ids")
        size = self.num_experts // self.top_k
        experts = jnp.stack([hashed(ids, self.seed + rank) % size + rank * size for rank in range(self.top_k)], -1)
        if self.table is not None:
            table = np.frombuffer(self.table, np.int32)
            known = jnp.asarray(table)[jnp.minimum(ids, len(table) - 1)]
            experts = jnp.where(ids < len(table), known, experts[..., 0])[..., None]
        experts = experts.astype(jnp.int32)
        chosen = experts[..., None] == jnp.arange(self.num_experts, dtype=jnp.int32)
        gates = chosen.any(-2).astype(jnp.float32) / self.top_k
        gating = Gating(gates, gates, experts, valid)
        return self.route(gating, jnp.ones(experts.shape), rng=rng)


def hashed(ids: Int[Array, "g s"], seed: int) -> Int[Array, "g s"]:
    """32 bits that look random: MurmurHash3's finalizer (public domain), of the id and the seed."""
    bits = ids.astype(jnp.uint32) + jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def balanced(counts: list[int], num_experts: int) -> Int[np.ndarray, "v"]:
    """The expert of each id: the most frequent ids first, each to the expert with the fewest tokens so far."""
    table, total = np.zeros(len(counts), np.int32), np.zeros(num_experts, np.int64)
    for token in np.argsort(-np.asarray(counts), kind="stable"):
        table[token] = total.argmin()
        total[table[token]] += counts[token]
    return table
