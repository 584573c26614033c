"""Which dispatcher suits a layer, and why."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from gshardx.layers.blending import Blend, Blending
from gshardx.layers.dispatch.contract import Rows, Slots
from gshardx.layers.dispatch.ragged import Ragged
from gshardx.layers.dispatch.slots import Einsum, Gather
from gshardx.layers.grouped import has_fast_kernel
from gshardx.layers.mixing import Mixing
from gshardx.layers.routing import Routing
from gshardx.sharding import backend

EINSUM_BELOW = 0.1
"""S/H up to which, on TPUs, one-hot products (2 S/3H of SwiGLU's FLOPs) are preferred to gathers of rows, which
flaxformer's authors call slow there. Not measured here; on CPUs gather is faster at every S/H."""
RAGGED_FROM = 128
"""Tokens in a group from which dropless sorts; a shorter group computes every expert for every token. By the group
alone, so that a prompt takes the same way in any batch and on any mesh."""


class Choice(NamedTuple):
    dispatcher: Einsum | Gather | Ragged
    reason: str


def choose_dispatcher(
    *, group: int, hidden: int, num_experts: int, top_k: int, dropless: bool, on: str | None = None
) -> Choice:
    """A dispatcher for a layer, by what benchmarks/moe_layer.py --part crossover measured on a CPU.

    group is s, hidden h; dropless: room for every choice; on: "cpu", "gpu", "tpu" or what is compiled for (default).
    """
    on = on or backend()
    if dropless and group >= RAGGED_FROM and has_fast_kernel(on):
        return Choice(Ragged(), f"ragged: dropless, where slots would be {num_experts / top_k:g} times the choices")
    if on == "tpu" and group / hidden <= EINSUM_BELOW:
        return Choice(Einsum(), f"einsum: S/H = {group / hidden:.2f}, so one-hot products cost little")
    why = "dropless by capacity" if dropless else f"S/H = {group / hidden:.2f}"
    return Choice(Gather(), f"gather: {why} on {on}")


@dataclasses.dataclass(frozen=True)
class Auto:
    """Chooses by :func:`choose_dispatcher` for the shapes that it meets, when the program is traced; for
    routers that merge experts :class:`Blending`.

    hidden: hidden units of an expert. wire: as in :class:`Einsum`.
    """

    hidden: int
    wire: Any = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots | Rows | Blend:
        return self._chosen(routing).dispatch(tokens, routing)

    def combine(self, expert_out: Any, routing: Routing) -> Float[Array, "g s m"]:
        return self._chosen(routing).combine(expert_out, routing)

    def _chosen(self, routing: Routing) -> Einsum | Gather | Ragged | Blending:
        if routing.mixed:
            return Mixing(self.wire)
        if routing.stretch is not None:
            return Blending()
        _, s, k = routing.experts.shape
        chosen = choose_dispatcher(
            group=s, hidden=self.hidden, num_experts=routing.num_experts, top_k=k, dropless=routing.capacity == s
        ).dispatcher
        return dataclasses.replace(chosen, wire=self.wire)
