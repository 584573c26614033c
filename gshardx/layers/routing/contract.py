"""The contract between routers, dispatchers and the MoE layer.

A router says who goes where; it works on groups of tokens ``[g, s, m]`` and no choice depends on another group, so that
no gate ever leaves its device. Only sums leave it: losses, statistics and loads, over the whole mesh.
"""

import dataclasses
from typing import Any, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Loss, Sums
from gshardx.layers.notes import MeanOf
from gshardx.layers.routing.statistics import RouterStats

RouterState = Any
"""What a router carries from step to step: a pytree of arrays, ``()`` for a router that carries nothing."""

Losses = dict[str, Float[Array, ""]]
"""Auxiliary losses by name, unweighted. "balance" is 1.0 at perfect balance, whatever k."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes. ``experts``, ``slots``, ``keep`` and ``weights`` are ``[g, s, k]``. A choice that is
    not kept (no slot left, rejected, not wanted, of none: ``num_experts`` and above, or padding) has weight 0."""

    experts: Int[Array, "g s k"]
    slots: Int[Array, "g s k"]
    """Place among the tokens of this group at this expert; below ``capacity`` wherever ``keep`` is True."""
    keep: Bool[Array, "g s k"]
    weights: Float[Array, "g s k"]
    """fp32, on the experts' outputs."""
    input_weights: Float[Array, "g s k"] | None
    """fp32, on the experts' inputs (Llama 4); None: inputs go as they are."""
    losses: Losses
    loss_sums: dict[str, Sums]
    """What ``losses`` are of; those of micro-batches add up."""
    stats: RouterStats
    state: RouterState
    """The next state; also what :meth:`Router.after_step` turns into the state of the next step."""
    num_experts: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})
    local: Float[Array, "g s z"] | None = None
    """fp32, on what experts make of a token where it is (layers/kinds.py); None: the router has no such experts."""
    mixed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Slots hold sums of a group's tokens, by ``input_weights``; a token has all slots of all experts for choices."""
    stretch: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Tokens that share a network merged from experts, weights being its mixture; None: experts stay apart."""

    def check_whole(self, dispatcher: str) -> None:
        """Raise BadInput if slots are ``mixed``: ``dispatcher`` puts one token in each."""
        if self.mixed:
            raise BadInput(f"dispatcher {dispatcher} puts one token in a slot, and this router mixes all; use Mixing()")


class Router(Protocol):
    """Chooses experts.

    ``rng`` is a key, or one for each group, in training and None at inference, where a choice depends on its own token
    alone unless the router has a ``leak``. ``state`` is what ``initial_state`` or the last ``after_step`` gave, which
    ``after_step_of_layers`` is of the stacked states of layers. ``choices`` is k of a :class:`Routing`: ``top_k``,
    unless a token's number varies.
    """

    num_experts: int
    top_k: int
    losses: tuple[tuple[str, Loss], ...]
    output_masking: float
    token_drop: float

    @property
    def leak(self) -> str | None: ...  # why no decoder can be served

    def choices(self, training: bool) -> int: ...
    def initial_state(self) -> RouterState: ...
    def after_step_of_layers(self, state: RouterState) -> RouterState: ...

    @property
    def keeps_notes(self) -> bool: ...  # or ``recall`` gives None

    def recall(self, tokens: Any, ids: Any, positions: Any, memory: Any, mean_of: MeanOf) -> tuple[Any, Any]:
        """What ``reading`` is to be told of each token's document so far, and the memory that holds these tokens."""
        ...

    def reading(self, ids: Int[Array, "g s"] | None, recalled: Float[Array, "g s n"] | None) -> "Router":
        """Itself, for tokens with these ids, and what ``recall`` found for them."""
        ...

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState
    ) -> Routing: ...

    def after_step(self, state: RouterState) -> RouterState:
        """The state of the next optimizer step, from what the calls of this step left; pure, once a step."""
