"""How long a collective takes on a network: bandwidth-optimal algorithms on tori and switches.

W is what one link carries in one direction, n the number of devices in the group. The formulas are those of the
scaling book (jax-ml.github.io/scaling-book/sharding and /gpus), written for a link's single direction and exact for
small extents. Assumed throughout: the group lies as compactly as its size allows, every link is free for it, the
stages of a hierarchical collective follow each other, and a hop costs `Chip.hop_seconds`.
"""

import functools
import math
from collections.abc import Callable, Sequence

from gshardx.sharding.chips import Chip
from gshardx.sharding.collectives import OPS

# Two devices on one chip (TPU7x) exchange by a die-to-die interface, six times as fast as an ICI link; recalled from
# docs.cloud.google.com/tpu/docs/tpu7x, not looked up.
_DIE_TO_DIE = 6


def seconds(
    op: str,
    bytes_per_device: float,
    axis_sizes: Sequence[int],
    chip: Chip,
    torus: Sequence[int],
    crosses_slices: bool,
    slices: int = 2,
) -> float:
    """Predicted seconds of one collective, latency included.

    - all-gather of pieces of b bytes: each device receives (n-1) b over all the links by which it can receive.
    - reduce-scatter of b bytes: the same in reverse with pieces of b/n. all-reduce: one after the other.
    - collective-broadcast: as an all-reduce, whose other operands are zero; a scatter and a gather.
    - all-to-all of b bytes: on a torus the fullest link bounds it (:func:`_exchange_load`); through a switch a device
      sends (n-1)/n b. ragged-all-to-all: the same, as if every device filled its operand evenly.
    - collective-permute of b bytes: b over one link.

    A group that spans slices first crosses the data-centre network, every device to its counterparts by its own
    `dcn_bandwidth`, then the network inside a slice.

    Args:
        op: one of OPS.
        bytes_per_device: the size of the operand that one device puts in.
        axis_sizes: sizes of the mesh axes whose devices form the group; only their product matters.
        chip: rates of a device.
        torus: the slice's extent along each dimension of the torus, () for a switch.
        crosses_slices: whether the group has devices in more than one slice (TPU) or host (GPU).
        slices: in how many, if so; each holds an equal share of the group.

    Raises:
        ValueError: ``op`` is none of OPS.
    """
    if op not in OPS:
        raise ValueError(f"{op}: not a collective; choose one of {', '.join(OPS)}")
    group = math.prod(axis_sizes)
    if group == 1:
        return 0.0
    outside = min(slices, group) if crosses_slices else 1
    inside = math.ceil(group / outside)
    gather = functools.partial(_gather, chip=chip, torus=tuple(torus), inside=inside, outside=outside)
    if op == "all-gather":
        return gather(bytes_per_device)
    if op == "reduce-scatter":
        return gather(bytes_per_device / group)
    if op in ("all-reduce", "collective-broadcast"):
        return 2 * gather(bytes_per_device / group)
    if op == "collective-permute":
        return bytes_per_device / (chip.dcn_bandwidth if crosses_slices else chip.ici_bandwidth) + chip.hop_seconds
    return _exchange(bytes_per_device, chip, tuple(torus), inside, outside)


def wraps(torus: Sequence[int], chip: Chip) -> tuple[bool, ...]:
    """Which dimensions of a slice close to rings.

    v5e and v6e: those of 16 chips. Chips with a three-dimensional torus: all, if the slice is made of whole cubes of
    4 x 4 x 4, whose faces the optical switches join; none otherwise (scaling book, "TPU Networking").
    """
    if not chip.ring:
        return (False,) * len(torus)
    closed = tuple(extent % chip.ring == 0 for extent in torus)
    return closed if chip.torus_dimensions < 3 else (all(closed),) * len(torus)


def _gather(piece: float, chip: Chip, torus: tuple[int, ...], inside: int, outside: int) -> float:
    """Seconds to give every device the pieces (bytes) of all: across slices, across chips, across a chip's devices."""
    across = piece * (outside - 1) / chip.dcn_bandwidth + _hops(outside - 1, chip)
    piece *= outside
    if not torus:
        return across + piece * (inside - 1) / chip.ici_bandwidth + _hops(inside - 1, chip)
    together, chips, rate = _share(chip, inside)
    within = piece * (together - 1) / (_DIE_TO_DIE * chip.ici_bandwidth) + _hops(together - 1, chip)

    def over(box: tuple[int, ...], rings: tuple[bool, ...]) -> float:
        links = sum(2 if ring else 1 for extent, ring in zip(box, rings, strict=True) if extent > 1)
        return piece * together * (chips - 1) / (rate * links) + chip.hop_seconds * _diameter(box, rings)

    return across + within + _fastest(over, chips, torus, chip)


def _exchange(operand: float, chip: Chip, torus: tuple[int, ...], inside: int, outside: int) -> float:
    """Seconds for every device to send an equal part of its operand (bytes) to each other device."""
    across = operand * (outside - 1) / outside / chip.dcn_bandwidth + _hops(outside - 1, chip)
    if not torus:
        return across + operand * (inside - 1) / inside / chip.ici_bandwidth + _hops(inside - 1, chip)
    together, chips, rate = _share(chip, inside)
    within = operand * (together - 1) / together / (_DIE_TO_DIE * chip.ici_bandwidth) + _hops(together - 1, chip)

    def over(box: tuple[int, ...], rings: tuple[bool, ...]) -> float:
        load = max(_exchange_load(extent, ring) for extent, ring in zip(box, rings, strict=True))
        return operand * together * load / rate + chip.hop_seconds * _diameter(box, rings)

    return across + within + _fastest(over, chips, torus, chip)


def _exchange_load(extent: int, ring: bool) -> float:
    """Operands that cross the fullest link, in one direction, when ``extent`` chips in a row exchange evenly.

    Ring: the mean distance, extent/4, over two directions: extent/8, which is the scaling book's V / (4 W) with V the
    bytes of the whole array and W both directions. Row of chips: extent/4 at the middle link. The largest extent of a
    square torus bounds the whole, hence O(sqrt(D)) of GShard (arXiv 2006.16668, section 4.2).
    """
    if ring:
        return extent // 2 * ((extent + 1) // 2) / (2 * extent)
    return extent // 2 * ((extent + 1) // 2) / extent


def _hops(others: int, chip: Chip) -> float:
    """Latency of a stage in which each device reaches each of ``others`` directly."""
    return chip.hop_seconds if others else 0.0


def _diameter(box: tuple[int, ...], rings: tuple[bool, ...]) -> int:
    return sum(extent // 2 if ring else extent - 1 for extent, ring in zip(box, rings, strict=True))


def _share(chip: Chip, inside: int) -> tuple[int, int, float]:
    """Devices of the group on each chip, its chips, and bytes/s of a link that are left for this group.

    A group with one device on each chip shares the links with the group of the chip's other devices.
    """
    together = math.gcd(inside, chip.devices_per_chip)
    return together, inside // together, chip.ici_bandwidth * together / chip.devices_per_chip


def _fastest(
    cost: Callable[[tuple[int, ...], tuple[bool, ...]], float], chips: int, torus: tuple[int, ...], chip: Chip
) -> float:
    """The least cost over the boxes of ``chips`` chips that tile the torus; a box wraps where it spans a ring."""
    if chips == 1:
        return 0.0
    closed = wraps(torus, chip)
    return min(
        cost(box, tuple(ring and extent == whole for extent, whole, ring in zip(box, torus, closed, strict=True)))
        for box in _boxes(chips, torus) or [(chips, *(1,) * (len(torus) - 1))]
    )


@functools.cache
def _boxes(chips: int, torus: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Extents, each a divisor of the torus's, whose product is ``chips``; empty where there are none."""
    if not torus:
        return [()] if chips == 1 else []
    return [
        (extent, *rest)
        for extent in range(1, torus[0] + 1)
        if torus[0] % extent == 0 and chips % extent == 0
        for rest in _boxes(chips // extent, torus[1:])
    ]
