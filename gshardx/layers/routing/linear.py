"""What routers with a linear gate share: the gate, its losses, and the way from chosen experts to a Routing."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import BalanceLoss, Gating, Loss, ZLoss
from gshardx.layers.param import param
from gshardx.layers.routing.choice import Capacity, Priority, assign_slots, take
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.statistics import count
from gshardx.sharding import shard


class LinearRouter(nnx.Module):
    """Base of the routers; not one itself.

    Args:
        width: m.
        num_experts: e.
        top_k: choices of a token, k.
        capacity: slots of an expert.
        priority: who takes them first.
        losses: auxiliary losses by name.
        bias: add a learned bias to the logits.
    """

    LOSSES: Mapping[str, Loss] = {"balance": BalanceLoss(), "z": ZLoss()}

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        capacity: Capacity = Capacity(),  # noqa: B008 (frozen)
        priority: Priority = "position",
        losses: Mapping[str, Loss] | None = None,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if top_k > num_experts:
            raise BadInput(f"top_k = {top_k} is more than num_experts = {num_experts}; use {num_experts} or less")
        # N(0, 0.02) as in the Switch and flaxformer code: gates start near uniform.
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), jax.nn.initializers.normal(0.02))
        self.bias = param(rngs.params(), "router", (num_experts,), jax.nn.initializers.zeros) if bias else None
        self.num_experts, self.top_k = num_experts, top_k
        self.capacity, self.priority = capacity, priority
        self.losses = tuple((self.LOSSES if losses is None else losses).items())

    def choices(self, training: bool) -> int:
        return self.top_k

    def initial_state(self) -> RouterState:
        return ()

    def after_step(self, state: RouterState) -> RouterState:
        return state

    def after_step_of_layers(self, state: RouterState) -> RouterState:
        return jax.vmap(self.after_step)(state) if jax.tree.leaves(state) else state

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e"]:
        """fp32, whatever the tokens are."""
        logits = self.product(tokens, self.kernel)
        return logits if self.bias is None else logits + self.bias[...]

    def product(self, tokens: Float[Array, "g s m"], kernel: nnx.Param[Array]) -> Float[Array, "g s e"]:
        """Of tokens with a matrix ``[m, e]``; fp32."""
        # Whole: on an fsdp x tensor mesh the partitioner would otherwise split it over ``tensor`` and move it twice.
        whole = shard(kernel[...], "model router")
        # By default accelerators would multiply in TF32 or bfloat16, and near ties fall otherwise on each.
        return jnp.einsum("gsm,me->gse", tokens.astype(jnp.float32), whole, precision=jax.lax.Precision.HIGHEST)

    def route(
        self,
        gating: Gating,
        weights: Float[Array, "g s k"],
        *,
        training: bool,
        judged: Gating | None = None,
        counted: Bool[Array, "g s"] | None = None,
        wanted: Bool[Array, "g s k"] | None = None,
        accepted: Bool[Array, "g s k"] | bool = True,
        state: RouterState = (),
    ) -> Routing:
        """Slots, losses and statistics for chosen experts.

        Args:
            gating: the decision; the gate of its first choice sets the priority "gate".
            weights: of the choices; those of choices that are not kept become 0.
            training: which capacity holds.
            judged: what losses see; default: the decision.
            counted: tokens that statistics count; default: those that losses do.
            wanted: choices that take a slot; default: every choice of a real token.
            accepted: choices that use the slot that they took.
            state: the next state.
        """
        experts = gating.experts
        counted = gating.valid if counted is None else counted
        _, s, k = experts.shape
        capacity = self.capacity.slots(s, self.num_experts, k, training)
        wanted = jnp.broadcast_to(counted[..., None], experts.shape) if wanted is None else wanted
        slots, load = assign_slots(experts, wanted, self.num_experts, self._priority(gating))
        keep = wanted & accepted
        if capacity < s:  # else all fit, as no token chooses an expert twice; slots that nobody asks for go
            keep &= slots < capacity
        sums = {name: loss.sums(judged or gating) for name, loss in self.losses}
        return Routing(
            experts=experts,
            slots=slots,
            keep=keep,
            weights=weights * keep,
            input_weights=None,
            losses={name: loss.value(sums[name]) for name, loss in self.losses},
            loss_sums=sums,
            stats=count(gating.logits, gating.gates, wanted & accepted, keep, load, counted, capacity),
            state=state,
            num_experts=self.num_experts,
            capacity=capacity,
        )

    def _priority(self, gating: Gating) -> Float[Array, "g s"] | None:
        return take(gating.gates, gating.experts[..., :1])[..., 0] if self.priority == "gate" else None


def normalised(weights: Float[Array, "g s k"], epsilon: float = 1e-9) -> Float[Array, "g s k"]:
    """Weights that add up to 1 over the choices."""
    return weights / (weights.sum(-1, keepdims=True) + epsilon)
