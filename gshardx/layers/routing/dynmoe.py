"""DynMoE (arXiv 2405.14297): each token activates as many experts as it passes thresholds; training adds and removes
experts.

    c_e = (x / |x|) . (w_e / |w_e|)                       fp32
    e is active where sigmoid(c_e) > sigmoid(G_e)         that is c_e > G_e; of more than top_k the top_k largest c_e
    y = 1/K sum over the K active experts of E_e(x)       the sign's gradient is passed straight through
    none active: 0 in training, the expert with the largest c_e at inference

"diversity" is the paper's auxiliary loss, ``|| (W'W - 1) of the experts that exist ||_F + mean |w_e|``, W' with columns
at length 1 in the first term. "balance" is that of the authors' code at balance 1: f and p are mean shares of 1/K.

``num_experts`` are the most that may exist. Every ``every`` steps those that no token activated are removed, and one is
added if there is room and some tokens activated none: the direction of these tokens' sum is its column, its G_e is 0,
and its weights are those of whoever was in its place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating, Loss, Sums, evenness
from gshardx.layers.param import param
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.cosine import unit
from gshardx.layers.routing.growth import Growth, Population, change, settled, start
from gshardx.layers.routing.linear import LinearRouter
from gshardx.sharding import shard


@dataclasses.dataclass(frozen=True)
class ActiveBalanceLoss(Loss):
    """Mean over groups of ``E sum_e f_e p_e`` of the tokens with active experts, each of which counts 1/K; E exist."""

    def sums(self, gating: Gating) -> Sums:
        real = gating.valid.astype(jnp.float32)
        gate = jnp.einsum("gse,gs->ge", gating.gates, real)
        share = jax.lax.stop_gradient(gate)
        even = evenness(share, gate, share.sum(-1)) * gating.own.exists.mean()  # which is of all that may exist
        return jnp.sum(even * real.sum(1)), real.sum()


@dataclasses.dataclass(frozen=True)
class DiversityLoss(Loss):
    """:func:`penalty`, as a mean over tokens."""

    def sums(self, gating: Gating) -> Sums:
        tokens = gating.valid.sum().astype(jnp.float32)
        return penalty(*gating.own) * tokens, tokens


class DynMoERouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (top_k is the most that a token may activate; it has no bias):

    initial: experts at first; None: ``num_experts``.
    every: steps between changes of the experts.
    """

    LOSSES = {**LinearRouter.LOSSES, "balance": ActiveBalanceLoss(), "diversity": DiversityLoss()}  # noqa: RUF012

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        initial: int | None = None,
        every: int = 100,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        if initial is not None and not 1 <= initial <= num_experts:
            raise BadInput(f"initial = {initial}: must be from 1 to num_experts = {num_experts}")
        if every < 1:
            raise BadInput(f"every = {every}: must be 1 step or more")
        if common.get("bias"):
            raise BadInput("bias = true: dynmoe has a threshold for each expert instead; leave bias out")
        super().__init__(width, num_experts, top_k, rngs=rngs, **common)
        initial_columns = jax.nn.initializers.orthogonal()
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), initial_columns)
        self.threshold = param(rngs.params(), "router", (num_experts,), jax.nn.initializers.zeros)
        self.width, self.initial, self.every = width, initial or num_experts, every

    def initial_state(self) -> Growth:
        return start(self.width, self.num_experts, self.initial)

    def after_step(self, state: Growth) -> Growth:
        counted = state._replace(steps=state.steps + 1)
        changed = change(counted)
        return jax.tree.map(lambda new, old: jnp.where(counted.steps >= self.every, new, old), changed, counted)

    def logits(
        self, tokens: Float[Array, "g s m"], columns: Float[Array, "m e"] | None = None
    ) -> Float[Array, "g s e"]:
        """Cosines with ``columns``, or with the kernel's; fp32."""
        columns = shard(self.kernel[...], "model router") if columns is None else columns
        return self.product(unit(tokens.astype(jnp.float32), axis=-1), unit(columns, axis=0))

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: Growth
    ) -> Routing:
        kernel, threshold = shard(self.kernel[...], "model router"), self.threshold[...]
        state = settled(state, kernel, threshold)
        columns, threshold = kernel + state.columns, threshold + state.thresholds
        cosines = self.logits(tokens, columns)
        active = (cosines > threshold) & state.exists
        # Cosines lie within 2 of each other: the active first, and those that do not exist last.
        experts = top_k(cosines - 4.0 * ~active - 8.0 * ~state.exists, self.top_k)
        chosen = take(active.astype(jnp.float32), experts)
        passed = chosen * take(jax.nn.sigmoid(cosines) - jax.nn.sigmoid(threshold), experts)
        lost = ~active.any(-1)
        if rng is None:
            chosen = jnp.where(lost[..., None] & (jnp.arange(self.top_k) == 0), 1.0, chosen)
        straight = chosen + (passed - jax.lax.stop_gradient(passed))  # exactly ``chosen``
        weights = straight / jnp.maximum(chosen.sum(-1, keepdims=True), 1.0)
        wanted = (chosen > 0) & valid[..., None]
        experts = jnp.where(wanted, experts, self.num_experts)
        place = experts[..., None] == jnp.arange(self.num_experts, dtype=jnp.int32)
        gates = jnp.einsum("gsk,gske->gse", weights, place.astype(weights.dtype))
        gating = Gating(cosines, gates, experts, valid, own=Population(columns, state.exists))
        routing = self.route(gating, weights, rng=rng, wanted=wanted, state=state)
        if rng is None:
            return routing
        unserved = jnp.sum(tokens.astype(jnp.float32), axis=(0, 1), where=(lost & valid)[..., None])
        state = state._replace(used=state.used + routing.stats.load, unserved=state.unserved + unserved)
        return dataclasses.replace(routing, state=jax.lax.stop_gradient(state))


def penalty(columns: Float[Array, "m e"], exists: Bool[Array, "e"]) -> Float[Array, ""]:
    """How alike the directions of those that exist are, and how long their columns.

    1e-6 under the first root: columns start orthogonal, where rounding alone would give a norm its slope.
    """
    alike = jnp.einsum("me,mf->ef", *2 * (unit(columns, axis=0),), precision=jax.lax.Precision.HIGHEST)
    others = exists[:, None] & exists & ~jnp.eye(len(exists), dtype=bool)  # of a column with itself it is 1 - 1
    lengths = jnp.sqrt(jnp.sum(columns * columns, axis=0) + 1e-12)
    mean = jnp.sum(jnp.where(exists, lengths, 0.0)) / jnp.maximum(exists.sum(), 1)
    return jnp.sqrt(jnp.sum(jnp.where(others, alike**2, 0.0)) + 1e-6) + mean
