"""Which dispatcher suits a layer, and why."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from gshardx.layers.dispatch.contract import Dispatcher, Rows, Slots
from gshardx.layers.dispatch.ragged import Ragged
from gshardx.layers.dispatch.slots import Einsum, Gather
from gshardx.layers.grouped import has_fast_kernel
from gshardx.layers.routing import Routing
from gshardx.sharding import RULES, axis_size

EINSUM_BELOW = 0.1
"""S/H up to which the one-hot products cost little beside the experts (2 S/3H of SwiGLU's FLOPs) and a TPU, whose
matrix unit idles during a gather, does better with them."""
RAGGED_FROM = 256
"""Tokens on a device from which dropless pays to sort: below, computing every expert for every token is as cheap."""


class Choice(NamedTuple):
    dispatcher: Einsum | Gather | Ragged
    reason: str


def choose_dispatcher(
    *, tokens: int, group: int, hidden: int, num_experts: int, top_k: int, dropless: bool, backend: str | None = None
) -> Choice:
    """A dispatcher for a layer; what it goes by on CPUs, benchmarks/moe_layer.py --part crossover measures.

    Args:
        tokens: that a device routes at once.
        group: tokens that compete for slots, s.
        hidden: hidden units of an expert, h.
        num_experts: e.
        top_k: k.
        dropless: whether there is room for every choice.
        backend: "cpu", "gpu" or "tpu"; default: the one in use.
    """
    backend = backend or jax.default_backend()
    if dropless and tokens >= RAGGED_FROM and has_fast_kernel(backend):
        return Choice(Ragged(), f"ragged: dropless, where slots would be {num_experts / top_k:g} times the choices")
    if backend == "tpu" and group / hidden <= EINSUM_BELOW:
        return Choice(Einsum(), f"einsum: S/H = {group / hidden:.2f}, so one-hot products cost little")
    return Choice(
        Gather(), f"gather: {'dropless by capacity' if dropless else f'S/H = {group / hidden:.2f}'} on {backend}"
    )


@dataclasses.dataclass(frozen=True)
class Auto:
    """Chooses by :func:`choose_dispatcher` for the shapes that it meets, when the program is traced.

    hidden: hidden units of an expert. wire: as in :class:`Einsum`.
    """

    hidden: int
    wire: Any = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots | Rows:
        return self._chosen(routing).dispatch(tokens, routing)

    def combine(self, expert_out: Any, routing: Routing) -> Float[Array, "g s m"]:
        return self._chosen(routing).combine(expert_out, routing)

    def _chosen(self, routing: Routing) -> Dispatcher:
        (g, s, k), e = routing.experts.shape, routing.num_experts
        here, dropless = g * s // math.prod(map(axis_size, RULES["group"])), routing.capacity == s
        chosen = choose_dispatcher(
            tokens=here, group=s, hidden=self.hidden, num_experts=e, top_k=k, dropless=dropless
        ).dispatcher
        return dataclasses.replace(chosen, wire=self.wire)
