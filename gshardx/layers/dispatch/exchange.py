"""Carrying rows that are sorted by expert to the devices that hold the experts, and back.

Runs on each of the d devices along ``expert`` (inside ``manual``), each with an equal part of the experts. A device may
receive every choice that the others could make, so there is room for it: ``bound`` rows from each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gshardx.layers.dispatch.carry import ALL_TO_ALL_RESULTS

AXIS = "expert"


def _before(counts: Int[Array, "*a n"]) -> Int[Array, "*a n"]:
    return jnp.cumsum(counts, axis=-1) - counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded:
    """A dense all-to-all of ``bound`` rows between each two devices, real or not. Runs everywhere."""

    counts: Int[Array, "d local_e"]
    """Rows for each expert, by destination."""
    bound: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, counts: Int[Array, "e"], devices: int, bound: int, rows: int) -> "Padded":
        return cls(counts.reshape(devices, -1), bound)

    @property
    def sent(self) -> int:
        """Places of the buffer that leaves this device."""
        return self.counts.shape[0] * self.bound

    def place(self, in_order: Int[Array, "n"], experts: Int[Array, "n"]) -> Int[Array, "n"]:
        """Where in that buffer the row goes that is number ``in_order`` by expert; ``sent`` for expert e (nowhere)."""
        to = experts // self.counts.shape[1]
        start = _before(self.counts.sum(1)).at[to].get(mode="fill", fill_value=0)
        return jnp.where(to < self.counts.shape[0], to * self.bound + in_order - start, self.sent)

    def there(self, rows: Float[Array, "sent m"]) -> Float[Array, "received m"]:
        return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)

    back = there  # transposing blocks twice changes nothing

    def expert_of_received(self) -> Int[Array, "received"]:
        """This device's own number of each received row's expert; its number of experts for empty places."""
        arriving = jax.lax.all_to_all(self.counts, AXIS, split_axis=0, concat_axis=0, tiled=True)
        arriving = checkpoint_name(arriving, ALL_TO_ALL_RESULTS[2])
        offset = jnp.arange(self.bound, dtype=jnp.int32)
        ends = jnp.cumsum(arriving, axis=1)
        return jnp.sum(offset[None, :, None] >= ends[:, None, :], axis=-1).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Compact:
    """``jax.lax.ragged_all_to_all``: only real rows travel. Not on CPUs (jax 0.12)."""

    counts: Int[Array, "d_from d_to local_e"]
    """Of every device; they are exchanged first."""
    bound: int = dataclasses.field(metadata={"static": True})
    sent: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, counts: Int[Array, "e"], devices: int, bound: int, rows: int) -> "Compact":
        everybodys = jax.lax.all_gather(counts.reshape(devices, -1), AXIS)
        return cls(checkpoint_name(everybodys, ALL_TO_ALL_RESULTS[2]), bound, rows)

    def place(self, in_order: Int[Array, "n"], experts: Int[Array, "n"]) -> Int[Array, "n"]:
        _, devices, each = self.counts.shape
        return jnp.where(experts < devices * each, in_order, self.sent)

    def there(self, rows: Float[Array, "sent m"]) -> Float[Array, "received m"]:
        room = self._room(rows, self.counts.shape[0] * self.bound)
        return jax.lax.ragged_all_to_all(
            rows, room, *offsets(self.counts.sum(-1), jax.lax.axis_index(AXIS)), axis_name=AXIS
        )

    def back(self, rows: Float[Array, "received m"]) -> Float[Array, "sent m"]:
        room = self._room(rows, self.sent)
        return jax.lax.ragged_all_to_all(
            rows, room, *offsets_back(self.counts.sum(-1), jax.lax.axis_index(AXIS)), axis_name=AXIS
        )

    def _room(self, rows: Float[Array, "n m"], places: int) -> Float[Array, "places m"]:
        """Zeros; made from the counts, because shard_map types what differs between devices apart from constants."""
        return jnp.zeros((places, *rows.shape[1:]), rows.dtype) + (0 * self.counts.sum()).astype(rows.dtype)

    def expert_of_received(self) -> Int[Array, "received"]:
        mine = self.counts[:, jax.lax.axis_index(AXIS)]
        devices, each = mine.shape
        row = jnp.arange(devices * self.bound, dtype=jnp.int32)
        run = jnp.searchsorted(jnp.cumsum(mine.reshape(-1)), row, side="right")
        return jnp.where(run < devices * each, run % each, each)


Offsets = tuple[Int[Array, "d"], Int[Array, "d"], Int[Array, "d"], Int[Array, "d"]]


def offsets(rows: Int[Array, "d_from d_to"], me: int | Int[Array, ""]) -> Offsets:
    """Of device ``me``, for ragged_all_to_all: where its rows for each device begin, how many they are, where each
    receiver puts them (behind those of the devices before ``me``), and how many rows ``me`` gets from each.
    """
    return _before(rows)[me], rows[me], _before(rows.T).T[me], rows[:, me]


def offsets_back(rows: Int[Array, "d_from d_to"], me: int | Int[Array, ""]) -> Offsets:
    """The same for the way back: every run of rows returns to the place that it left."""
    return _before(rows.T)[me], rows[:, me], _before(rows)[:, me], rows[me]
