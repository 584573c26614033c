"""The device mesh: four axes, real devices or simulated ones.

``data`` and ``fsdp`` split the batch, ``expert`` splits the batch outside the experts and the experts inside them
(GShard's layout, arXiv 2006.16668 section 3.2), ``tensor`` splits heads and hidden units.
"""

import dataclasses
import math
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gshardx.errors import BadInput

# Eight simulated devices share few cores, so one of them can wait a long time for the others; XLA aborts the process
# after 40 s by default (seen with 8 devices on 2 cores).
_RENDEZVOUS_SECONDS = 1200


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each mesh axis; their product is the number of devices."""

    data: int = 1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = 1
    """Shares of the batch whose devices also split parameters and optimizer state (ZeRO-3)."""
    expert: int = 1
    """Shares of the batch whose devices also split the experts; tokens travel between them by all-to-all."""
    tensor: int = 1
    """Shares of attention heads and expert hidden units."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise BadInput(f"mesh.{field.name} = {size}: a mesh axis has at least one device; use 1 or more")

    @property
    def shape(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @property
    def size(self) -> int:
        return math.prod(self.shape.values())

    @property
    def batch_shards(self) -> int:
        """Into how many shares the batch is split."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.shape.items())


def simulate_devices(count: int) -> None:
    """Ask XLA for ``count`` CPU devices. Call before JAX first touches a device; accelerators are not affected."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={count}"
    if "collective_call_terminate_timeout" not in flags:
        flags += f" --xla_cpu_collective_call_terminate_timeout_seconds={_RENDEZVOUS_SECONDS}"
    os.environ["XLA_FLAGS"] = flags.strip()


def build_mesh(config: MeshConfig) -> Mesh:
    """Lay the first ``config.size`` devices out as a (data, fsdp, expert, tensor) mesh with Auto axes.

    Raises:
        BadInput: fewer devices are present than the mesh names.
    """
    devices = jax.devices()
    if config.size > len(devices):
        raise BadInput(
            f"mesh ({config}) needs {config.size} devices and {len(devices)} {devices[0].platform} device(s) are here; "
            f"choose mesh axes whose product is at most {len(devices)}"
        )
    grid = np.array(devices[: config.size]).reshape(tuple(config.shape.values()))
    return Mesh(grid, tuple(config.shape), axis_types=(AxisType.Auto,) * grid.ndim)


def one_program_at_a_time(mesh: Mesh) -> bool:
    """Whether each multi-device program must finish before the next starts.

    Simulated devices share a thread pool: with several programs queued, the devices of one can starve those of the
    other inside a collective and all wait for ever. Accelerators run programs in the order they were queued.
    """
    return mesh.devices.flat[0].platform == "cpu" and mesh.size > 1
