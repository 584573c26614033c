"""GShard's device assignment: an array of device ids, one a piece, in place of names (arXiv 2006.16668 section 3.2).

``[3, 16, 64]`` with an assignment of shape ``[1, 2, 4]`` is cut into 8 pieces of ``[3, 8, 16]``; piece ``[0, i, j]``
lies on device ``assignment[0, i, j]``.
"""

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding.axes import written


def assigned_sharding(
    ids: np.ndarray, shape: Sequence[int], mesh: Mesh, tensor: str = "array", *, uneven: bool = False
) -> NamedSharding:
    """Where an array of ``shape`` lies by the assignment ``ids``.

    A PartitionSpec of ``mesh`` where one says the same, since XLA, checkpoints and tables then speak of its axes;
    otherwise a mesh of its own, with one axis a dimension.

    Args:
        ids: device ids, of the rank of ``shape``.
        mesh: whose devices the ids are; an empty mesh stands for all devices.
        uneven: let dimensions be that do not divide.

    Raises:
        BadInput: not integers, a rank mismatch, not each device once, or a dimension that does not divide.
    """
    devices = {device.id: device for device in (jax.devices() if mesh.empty else mesh.devices.flat)}
    where = f"{tensor} {list(shape)} (device assignment of shape {list(ids.shape)})"
    works = _proposal(shape, len(devices))
    if not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(f"{where}: it holds {ids.dtype}, not device ids; {works}")
    if ids.ndim != len(shape):
        raise BadInput(f"{where}: it has {ids.ndim} dimensions and the tensor {len(shape)}; {works}")
    if sorted(ids.flat) != sorted(devices):
        raise BadInput(
            f"{where}: it must name each of {len(devices)} devices once, and {_fault(ids, devices)}; {works}"
        )
    for dimension, (size, parts) in enumerate(zip(shape, ids.shape, strict=True)):
        if size % parts and not uneven:
            raise BadInput(
                f"{where}: dimension {dimension} = {size} does not divide into {parts} pieces; "
                f"pad it to {-(-size // parts) * parts} (inside jit, uneven=True does); {works}"
            )
    spec = None if mesh.empty else _spec_on(ids, mesh)
    if spec is not None:
        return NamedSharding(mesh, spec)
    names = tuple(f"dimension_{dimension}" for dimension in range(ids.ndim))
    grid = np.array([devices[int(i)] for i in ids.flat], dtype=object).reshape(ids.shape)
    return NamedSharding(Mesh(grid, names, axis_types=(AxisType.Auto,) * ids.ndim), PartitionSpec(*names))


def _fault(ids: np.ndarray, devices: Collection[int]) -> str:
    """The first device that is unknown, missing or named twice."""
    count = Counter(ids.flat)
    unknown = [i for i in count if i not in devices]
    wrong = unknown[0] if unknown else next(i for i in devices if count[i] != 1)
    return f"device {wrong} is {'unknown' if unknown else f'there {count[wrong]} times'}"


def _spec_on(ids: np.ndarray, mesh: Mesh) -> PartitionSpec | None:
    """The spec of ``mesh`` that puts each piece where ``ids`` puts it, if there is one."""
    axes = [(axis, place) for place, axis in enumerate(mesh.axis_names) if mesh.shape[axis] > 1]
    own = mesh.device_ids.squeeze()
    for order in itertools.permutations(range(len(axes))):
        if not np.array_equal(own.transpose(order).ravel(), ids.ravel()):
            continue
        left = [axes[place][0] for place in order]
        spec: list[tuple[str, ...] | None] = []
        for parts in ids.shape:
            taken: tuple[str, ...] = ()
            while left and math.prod(mesh.shape[a] for a in taken) < parts:
                taken = (*taken, left.pop(0))
            if math.prod(mesh.shape[a] for a in taken) != parts:
                break
            spec.append(taken or None)
        else:
            return PartitionSpec(*spec)
    return None


def _proposal(shape: Sequence[int], count: int) -> str:
    """An assignment of ``count`` devices that divides ``shape``, in words."""
    parts = [1] * len(shape)
    for factor in _prime_factors(count):
        fit = [d for d, size in enumerate(shape) if size % (parts[d] * factor) == 0]
        if not fit:
            whole = written(PartitionSpec(*[None] * len(shape)))
            return f"no assignment of {count} devices divides it; {whole} would work"
        widest = max(fit, key=lambda d: shape[d] // parts[d])
        parts[widest] *= factor
    return f"the {count} device ids in the shape {parts} would work"


def _prime_factors(n: int) -> list[int]:
    factors, p = [], 2
    while n > 1:
        while n % p == 0:
            factors.append(p)
            n //= p
        p += 1
    return factors[::-1]
