"""What all routers share: capacity, losses, and the way from chosen experts to a Routing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import BalanceLoss, Gating, Loss, ZLoss
from gshardx.layers.draws import draw, folded, row_keys
from gshardx.layers.routing.choice import Capacity, Priority, assign_slots, take
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.statistics import count

_AT_PRIORITY = 2**32 - 2
"""Where routers fold small numbers into a group's key, the priority "random" folds this."""


class RouterBase(nnx.Module):
    """Base of the routers; not one itself.

    Args:
        num_experts: e.
        top_k: choices of a token, k.
        capacity: slots of an expert.
        priority: who takes them first.
        losses: auxiliary losses by name.
        output_masking: share of the choices whose expert's output training leaves out; the others count for more
            (expert output masking of NLLB, arXiv 2207.04672, which has 0.2).
        token_drop: share of a group's tokens that training does not route: they take no slot, and count nowhere.
    """

    MIXES = False
    """Whether its routings are ``mixed``."""
    LOSSES: Mapping[str, Loss] = {"balance": BalanceLoss(), "z": ZLoss()}

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        capacity: Capacity = Capacity(),  # noqa: B008 (frozen)
        priority: Priority = "position",
        losses: Mapping[str, Loss] | None = None,
        output_masking: float = 0.0,
        token_drop: float = 0.0,
    ) -> None:
        if top_k > num_experts:
            raise BadInput(f"top_k = {top_k} is more than num_experts = {num_experts}; use {num_experts} or less")
        self.num_experts, self.top_k = num_experts, top_k
        if not 0 <= output_masking < 1:
            raise BadInput(f"output_masking = {output_masking}: must be 0 or more and below 1; NLLB has 0.2")
        if not 0 <= token_drop < 1:
            raise BadInput(f"token_drop = {token_drop}: must be 0 or more and below 1")
        self.capacity, self.priority = capacity, priority
        self.output_masking, self.token_drop = output_masking, token_drop
        self.losses = tuple((self.LOSSES if losses is None else losses).items())

    @property
    def leak(self) -> str | None:
        """How tokens, without an rng, hang on later ones of their row: no decoder serves that. None: they don't."""
        return None if self.capacity.evaluation is None else "an expert may be full, of later tokens too"

    def choices(self, training: bool) -> int:
        return self.top_k

    def stretch(self, group: int) -> int | None:
        """Tokens of a ``group`` that share a network merged from experts; None: no experts are merged."""
        return None

    def initial_state(self) -> RouterState:
        return ()

    def after_step(self, state: RouterState) -> RouterState:
        return state

    def after_step_of_layers(self, state: RouterState) -> RouterState:
        return jax.vmap(self.after_step)(state) if jax.tree.leaves(state) else state

    keeps_notes = False

    def recall(
        self,
        tokens: Float[Array, "b t m"],
        ids: Int[Array, "b t"] | None,
        positions: Int[Array, "b t"],
        memory: Any,
        mean_of: Callable[..., Any],
    ) -> tuple[Any, Any]:
        return None, memory

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Float[Array, "g s n"] | None = None) -> Any:
        return self

    def route(
        self,
        gating: Gating,
        weights: Float[Array, "g s k"],
        *,
        rng: Array | None,
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
            rng: whether it is training, which has its own capacity, and what the priority "random" draws from.
            judged: what losses see; default: the decision.
            counted: tokens that statistics count; default: those that losses do.
            wanted: choices that take a slot; default: every choice of a real token.
            accepted: choices that use the slot that they took.
            state: the next state.
        """
        experts = gating.experts
        counted = gating.valid if counted is None else counted
        _, s, k = experts.shape
        capacity = self.capacity.slots(s, self.num_experts, k, rng is not None)
        wanted = jnp.broadcast_to(counted[..., None], experts.shape) if wanted is None else wanted
        slots, load = assign_slots(experts, wanted, self.num_experts, self._priority(gating, rng))
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

    def _priority(self, gating: Gating, rng: Array | None) -> Float[Array, "g s"] | None:
        if self.priority == "random" and rng is not None:
            return draw(jax.random.uniform, folded(row_keys(rng, len(gating.valid)), _AT_PRIORITY), gating.valid.shape)
        return take(gating.gates, gating.experts[..., :1])[..., 0] if self.priority == "gate" else None
