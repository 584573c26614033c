"""The device mesh: four axes over real devices, simulated ones, or those of a compile-only topology.

``data`` and ``fsdp`` split the batch, ``expert`` splits the batch outside the experts and the experts inside them
(GShard's layout, arXiv 2006.16668 section 3.2), ``tensor`` splits heads and hidden units. In this order each axis sends
more, and more often, than the one before; so where devices form islands of fast links, the slow network between them
carries ``data`` first, then ``fsdp``, then ``expert``, and never ``tensor``.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.mesh import get_concrete_mesh  # jax.sharding.get_mesh refuses to answer inside jit (jax 0.10 to 0.12)
from jax.experimental import mesh_utils
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


def simulate_devices(count: int, processes: int = 1) -> None:
    """Ask XLA for ``count`` CPU devices over ``processes`` processes, each of which calls this.

    Call before JAX first touches a device; accelerators are not affected.

    Raises:
        BadInput: ``count`` does not divide over ``processes``.
    """
    if count % processes:
        raise BadInput(
            f"a mesh of {count} device(s) does not divide over {processes} processes; "
            f"use {-(-count // processes) * processes} devices"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={count // processes}"
    if "collective_call_terminate_timeout" not in flags:
        flags += f" --xla_cpu_collective_call_terminate_timeout_seconds={_RENDEZVOUS_SECONDS}"
    os.environ["XLA_FLAGS"] = flags.strip()


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the first ``config.size`` devices out as a (data, fsdp, expert, tensor) mesh with Auto axes.

    Islands of fast links (see :func:`islands_of`) are laid out one by one, TPU slices along their torus, and joined
    along ``data``, ``fsdp`` and ``expert``, as far to the left as their number allows.

    Args:
        config: the shape.
        devices: JAX devices, or those of a compile-only topology; default: the devices that are here.

    Raises:
        BadInput: there are fewer devices than the mesh names, they leave a process without one, they fill an island
            only in part, or ``tensor`` would have to cross islands.
    """
    given = list(jax.devices() if devices is None else devices)
    if config.size > len(given):
        raise BadInput(
            f"mesh ({config}) needs {config.size} devices and {len(given)} {given[0].platform} device(s) are here; "
            f"choose mesh axes whose product is at most {len(given)}"
        )
    chosen = given[: config.size]
    if devices is None and len({d.process_index for d in chosen}) < jax.process_count():
        raise BadInput(
            f"mesh ({config}) takes {config.size} of {len(given)} devices and leaves a process without one; "
            f"choose mesh axes whose product is {len(given)}"
        )
    grid = _grid(config, islands_of(chosen), len(given))
    return Mesh(grid, tuple(config.shape), axis_types=(AxisType.Auto,) * grid.ndim)


def islands_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by fast network: TPU slices (ICI); GPUs of one host or NVLink domain; all CPU devices.

    JAX gives both as ``slice_index`` where there are several; GPUs without one are told apart by their process.
    """
    islands: dict[int, list[Any]] = {}
    for device in devices:
        process = device.process_index if device.platform in ("gpu", "cuda", "rocm") else 0
        island = 0 if device.platform == "cpu" else getattr(device, "slice_index", process)
        islands.setdefault(island, []).append(device)
    return [islands[key] for key in sorted(islands)]


def _grid(config: MeshConfig, islands: list[list[Any]], given: int) -> np.ndarray:
    """Devices in the mesh's shape: each axis runs over islands first, then inside one."""
    size, smallest = len(islands[0]), min(map(len, islands))
    if smallest < size:
        fits = ", ".join(str(n) for n in range(size, given + 1, size))
        raise BadInput(
            f"mesh ({config}) takes {smallest} of the {size} devices of its last slice or host; "
            f"choose mesh axes whose product is one of {fits}"
        )
    shape, across, left = tuple(config.shape.values()), [], len(islands)
    for axis in (config.data, config.fsdp, config.expert):
        across.append(math.gcd(left, axis))
        left //= across[-1]
    if left > 1:
        better = dataclasses.replace(config, data=config.data * left, tensor=config.tensor // left)
        raise BadInput(
            f"mesh ({config}) on {len(islands)} slices or hosts of {size} devices: data * fsdp * expert = "
            f"{config.batch_shards} is not a multiple of {len(islands)}, so tensor would cross the slow network; "
            f"use mesh ({better})"
        )
    across.append(1)
    inside = tuple(whole // outer for whole, outer in zip(shape, across, strict=True))
    grids = np.stack([_laid_out(inside, island) for island in islands]).reshape(*across, *inside)
    return grids.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)


def _laid_out(shape: tuple[int, ...], island: list[Any]) -> np.ndarray:
    """One island's devices: TPUs so that axes are rings of the torus where they can be, others in their order."""
    if island[0].platform == "tpu" and len(island) > 1:
        try:
            # Hosts need no contiguous submeshes: each reads what its own devices hold (see Job.to_device).
            return mesh_utils.create_device_mesh(shape, island, allow_split_physical_axes=True)
        except (AssertionError, NotImplementedError, ValueError) as error:
            reason = str(error).split("\n")[0][:200] or type(error).__name__
            warnings.warn(f"mesh {shape}: the TPUs do not form a torus; kept in order ({reason})", stacklevel=4)
    grid = np.empty(len(island), dtype=object)
    grid[:] = island
    return grid.reshape(shape)


def backend() -> str:
    """What a program that is traced here will run on, "cpu", "gpu" or "tpu": the devices of the mesh of
    ``jax.set_mesh``, which may be those of a topology, else JAX's default."""
    mesh = get_concrete_mesh()
    return jax.default_backend() if mesh is None or mesh.empty else str(mesh.devices.flat[0].platform)


def one_program_at_a_time(mesh: Mesh) -> bool:
    """Whether each multi-device program must finish before the next starts.

    Simulated devices share a thread pool: with several programs queued, the devices of one can starve those of the
    other inside a collective and all wait for ever. Accelerators run programs in the order they were queued.
    """
    return mesh.devices.flat[0].platform == "cpu" and mesh.size > 1
