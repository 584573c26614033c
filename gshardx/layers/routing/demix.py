"""DEMix layers (Gururangan et al., arXiv 2108.05036): one expert a domain, chosen by the document's tag.

    expert = number of the domain;  weight 1              nothing is learned

An expert is trained on its domain alone, may be added or left out later, and a text of no known domain is read by all
of them, weighed by how well each has foretold it so far: :class:`gshardx.models.domains.DomainMixture`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.common import RouterBase
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.tags import Tagged


class DemixRouter(Tagged, RouterBase):
    """Args, beside those of :class:`RouterBase`:

    width: m; not looked at.
    tags: the domains' tokens, by id, one an expert. What no tag precedes is of the first domain.
    """

    def __init__(
        self, width: int, num_experts: int, *, tags: list[int] | None = None, rngs: Any = None, **common: Any
    ) -> None:
        Tagged.__init__(self, tags)
        if len(self.tags) != num_experts:
            raise BadInput(f"tags name {len(self.tags)} domains, but num_experts = {num_experts}; give one an expert")
        RouterBase.__init__(self, num_experts, 1, **common)

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
        experts = (self.seen(ids, recalled, valid) % self.num_experts)[..., None]
        gates = jax.nn.one_hot(experts[..., 0], self.num_experts, dtype=jnp.float32)
        return self.route(Gating(gates, gates, experts, valid), jnp.ones(experts.shape), rng=rng)
