"""GShard's annotations on values inside jit: replicate, split, shard, and the boundary pair ``reshard``.

Each is a hint to XLA's SPMD partitioner at the mesh set by ``jax.set_mesh``; without a mesh it does nothing, so that
annotated layers run unchanged on one device. Names follow GShard (arXiv 2006.16668 section 3.1).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from gshardx.errors import BadInput
from gshardx.sharding.axes import RULES, Rules, partition_spec, unchecked_spec


def replicate(x: Array) -> Array:
    """Every device holds all of ``x``."""
    return _constrain(x, PartitionSpec())


def split(x: Array, dimension: int, axis: str) -> Array:
    """Split one dimension of ``x`` over the mesh axis ``axis``; every other dimension is whole.

    Raises:
        BadInput: the mesh has no such axis, or the dimension does not divide over it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if axis not in mesh.shape:
        raise BadInput(f"split of {list(x.shape)}: the mesh has no axis {axis!r}; it has {', '.join(mesh.shape)}")
    if x.shape[dimension] % mesh.shape[axis]:
        raise BadInput(
            f"split of {list(x.shape)}: dimension {dimension} = {x.shape[dimension]} does not divide over mesh axis "
            f"{axis} = {mesh.shape[axis]}; pad it to a multiple"
        )
    spec: list[str | None] = [None] * x.ndim
    spec[dimension] = axis
    return _constrain(x, PartitionSpec(*spec))


def shard(x: Array, axes: str, rules: Rules = RULES) -> Array:
    """Lay ``x`` out by logical names, one a dimension: ``shard(x, "batch time model")``.

    Raises:
        BadInput: as :func:`gshardx.sharding.axes.partition_spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return _constrain(x, partition_spec(axes.split(), x.shape, mesh, rules))


def reshard(x: Array, from_: str, to: str, rules: Rules = RULES) -> Array:
    """Move ``x`` from one layout to another, in the forward pass and, mirrored, in the backward pass.

    A single constraint fixes only one side of the boundary, and the partitioner then gathers in the backward pass
    (tests/sharding/test_annotate.py counts it). With both sides fixed the transpose has both too, and group-split <->
    expert-split is an all-to-all in both directions and nothing else.
    """
    return shard(shard(x, from_, rules), to, rules)


def manual(
    function: Callable[..., Any],
    in_axes: Sequence[str],
    out_axes: str,
    rules: Rules = RULES,
    *,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """Run ``function`` on each device with its own shards: GShard's auto-to-manual partition (arXiv 2006.16668 section
    3.2), over ``jax.shard_map``. Without a mesh, ``function`` itself.

    Args:
        function: sees local shapes; collectives inside name mesh axes.
        in_axes: logical names of each argument's leading dimensions; an argument may be a pytree whose leaves share
            them.
        out_axes: of the result.
        rules: where the names live.
        check_vma: let shard_map check what differs between devices; kernels written in Pallas do not say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    ins = tuple(unchecked_spec(axes.split(), mesh, rules) for axes in in_axes)
    out = unchecked_spec(out_axes.split(), mesh, rules)
    return jax.shard_map(function, in_specs=ins, out_specs=out, check_vma=check_vma)


def axis_size(axis: str) -> int:
    """Devices along a mesh axis of the context; 1 without a mesh or without that axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape.get(axis, 1))


def _constrain(x: Array, spec: PartitionSpec) -> Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
