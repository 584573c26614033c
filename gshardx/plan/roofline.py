"""How long a step must take at least: its instructions on a chip's roofline, its collectives on the network."""

import dataclasses
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from gshardx.plan.network import seconds
from gshardx.sharding import Collective
from gshardx.sharding.chips import Chip
from gshardx.sharding.cost import costs
from gshardx.sharding.hlo import Program
from gshardx.sharding.mesh import islands_of


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one device.

    Attributes:
        compute: of all matrix products at the chip's peak.
        memory: of all reads and writes at the bandwidth of its memory.
        device: instructions one after another, each bound by the slower of its two.
        interconnect: of all collectives, one after another.
    """

    compute: float
    memory: float
    device: float
    interconnect: float

    @property
    def step(self) -> float:
        """If nothing overlaps. A compiler that hides all communication comes down to ``device``."""
        return self.device + self.interconnect

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda part: getattr(self, part))


def roofline(program: Program, found: Iterable[Collective], mesh: Mesh, chip: Chip, torus: Sequence[int]) -> Roofline:
    """Predict a compiled step on ``chip``; collectives travel on the mesh axes that they name."""
    compute = memory = device = 0.0
    for cost in costs(program):
        products, traffic = cost.flops / chip.peak_flops, cost.bytes / chip.hbm_bandwidth
        compute += cost.times * products
        memory += cost.times * traffic
        device += cost.times * max(products, traffic)
    interconnect = sum(collective_seconds(one, mesh, chip, torus) for one in found)
    return Roofline(compute, memory, device, interconnect)


def collective_seconds(one: Collective, mesh: Mesh, chip: Chip, torus: Sequence[int]) -> float:
    """All ``one.count`` executions of a collective."""
    slices = slices_of(mesh, one.axes)
    sizes = [mesh.shape[axis] for axis in one.axes]
    return one.count * seconds(one.op, one.bytes_per_device / one.count, sizes, chip, torus, slices > 1, slices)


def slices_of(mesh: Mesh, axes: Iterable[str]) -> int:
    """Over how many slices, or for GPUs hosts, the devices along ``axes`` are spread."""
    along = [mesh.axis_names.index(axis) for axis in axes]
    corner = tuple(slice(None) if at in along else 0 for at in range(mesh.devices.ndim))
    return len(islands_of(list(mesh.devices[corner].reshape(-1))))
