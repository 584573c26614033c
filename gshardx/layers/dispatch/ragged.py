"""Dropless dispatch: rows sorted by expert, without padding between experts (MegaBlocks, arXiv 2211.15841).

Each device sorts its choices by expert, sends every expert's rows to the device that holds it, and sorts what it
received by expert again; the way back is the same, mirrored. Choices that a router dropped are not sent.
"""

import dataclasses
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.dispatch.carry import Wire, carry
from gshardx.layers.dispatch.contract import Rows
from gshardx.layers.dispatch.exchange import AXIS, Compact, Padded
from gshardx.layers.dispatch.rows import collect, inverse, spread
from gshardx.layers.routing import Routing
from gshardx.layers.routing.choice import sort_by_expert
from gshardx.sharding import axis_size, backend, manual


class _Journey(NamedTuple):
    """On one device: how rows came from others, and where each stands once sorted by expert."""

    exchange: Padded | Compact
    slot: Int[Array, "1 received 1"]
    source: Int[Array, "1 received"]


class _Plan(NamedTuple):
    """On one device: where the choices of its own tokens stand in what leaves it, and the journey from there."""

    slot: Int[Array, "1 n k"]
    source: Int[Array, "1 sent"]
    journey: _Journey | None


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sorted rows for grouped matrix multiplication. There is room for all that can be sent: nothing overflows.

    exchange: how rows travel between devices: "compact" (``ragged_all_to_all``), "padded" (a dense all-to-all with room
        for the worst case), or "auto": compact wherever the backend has it.
    wire: type in which they travel.
    """

    exchange: Literal["auto", "compact", "padded"] = "auto"
    wire: Wire = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Rows:
        routing.check_whole("ragged")
        devices = axis_size(AXIS)
        if routing.num_experts % devices:
            raise BadInput(f"{routing.num_experts} experts do not divide over mesh axis {AXIS} = {devices}")
        compact = self.exchange == "compact" or (self.exchange == "auto" and backend() != "cpu")

        def send(tokens: Array, experts: Array, weights: Array | None) -> Rows:
            return _sent(tokens, experts, weights, routing.num_experts, devices, compact, self.wire)

        experts = jnp.where(routing.keep, routing.experts, routing.num_experts)
        names = ("group token model", "group token choice", "group token choice")
        return manual(send, names, "group")(tokens, experts, routing.input_weights)

    def combine(self, expert_out: Rows, routing: Routing) -> Float[Array, "g s m"]:
        def bring(rows: Rows, weights: Array) -> Array:
            return _returned(rows, weights, self.wire)

        return manual(bring, ("group", "group token choice"), "group token model")(expert_out, routing.weights)


def _sent(
    tokens: Float[Array, "g s m"],
    experts: Int[Array, "g s k"],
    weights: Float[Array, "g s k"] | None,
    num_experts: int,
    devices: int,
    compact: bool,
    wire: Wire,
) -> Rows:
    """On one device: the rows of its own experts, from all devices that share them."""
    (g, s, k), m = experts.shape, tokens.shape[-1]
    ids = experts.reshape(g * s * k)
    order, counts = sort_by_expert(ids, num_experts)
    in_order = jnp.zeros_like(ids).at[order].set(jnp.arange(len(ids), dtype=ids.dtype), unique_indices=True)
    if devices == 1:
        place, sent = jnp.where(ids < num_experts, in_order, len(ids)), len(ids)
    else:
        bound = g * s * min(k, num_experts // devices)
        exchange = (Compact if compact else Padded).of(counts, devices, bound, len(ids))
        place, sent = exchange.place(in_order, ids), exchange.sent
    slot = place.reshape(1, g * s, k)
    source = inverse(slot, sent)
    flat = None if weights is None else weights.reshape(1, g * s, k)
    rows = spread(tokens.reshape(1, g * s, m), flat, slot, source)
    if devices == 1:
        return _on_leading_axis(Rows(rows[0], counts, _Plan(slot, source, None)))
    order, counts = sort_by_expert(exchange.expert_of_received(), num_experts // devices)
    journey = _Journey(exchange, inverse(order[None, :, None], len(order))[..., None], order[None])
    rows = spread(carry(True, wire, rows[0], exchange)[None], None, journey.slot, journey.source)
    return _on_leading_axis(Rows(rows[0], counts, _Plan(slot, source, journey)))


def _returned(expert_out: Rows, weights: Float[Array, "g s k"], wire: Wire) -> Float[Array, "g s m"]:
    """On one device: the weighted sums of its own tokens' rows."""
    here = jax.tree.map(lambda leaf: leaf[0], expert_out)
    rows, (slot, source, journey) = here.values[None], here.plan
    if journey is not None:
        leaving = collect(rows, None, journey.slot, journey.source)[0]
        rows = carry(False, wire, leaving, journey.exchange)[None]
    g, s, k = weights.shape
    return collect(rows, weights.reshape(1, g * s, k), slot, source).reshape(g, s, -1)


def _on_leading_axis(rows: Rows) -> Rows:
    return cast(Rows, jax.tree.map(lambda leaf: leaf[None], rows))
