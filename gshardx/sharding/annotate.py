"""GShard's annotations: replicate, split, shard, the boundary pair ``reshard`` and ``manual``.

Each speaks of the mesh set by ``jax.set_mesh``; without one it does nothing, so that annotated layers run unchanged on
one device. Names follow GShard (arXiv 2006.16668 section 3.1). What is annotated may be

- an array: inside jit a constraint on XLA's SPMD partitioner, outside it a move,
- an ``nnx.Variable`` where it is made: the one returned remembers its layout, also without a mesh, for
  :func:`gshardx.sharding.variable_spec`, and its value is laid out,
- a ``jax.ShapeDtypeStruct``: the one returned has the sharding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax._src.mesh import get_concrete_mesh  # jax.sharding.get_mesh refuses to answer inside jit (jax 0.10 to 0.12)
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gshardx.errors import BadInput
from gshardx.sharding.assignment import assigned_sharding
from gshardx.sharding.axes import (
    RULES,
    Entry,
    Rules,
    entries_of,
    nearest,
    partition_spec,
    unchecked_spec,
    working_spec,
    written,
)

X = TypeVar("X")


def replicate(x: X, *, name: str = "array") -> X:
    """Every device holds all of ``x``; ``name`` is what errors call it."""
    return _annotated(x, ((),) * len(_shape(x)), RULES, False, name)


def split(x: X, dimension: int, axis: str, *, uneven: bool = False, name: str = "array") -> X:
    """Split one dimension of ``x`` over the mesh axis ``axis``; every other dimension is whole.

    Args:
        x: an array, Variable or ShapeDtypeStruct.
        dimension: from the front, or negative from the back.
        axis: of the mesh.
        uneven: as in :func:`shard`.
        name: what errors call ``x``.

    Raises:
        BadInput: ``x`` has no such dimension, the mesh no such axis, or the dimension does not divide over it.
    """
    rank = len(_shape(x))
    if not -rank <= dimension < rank:
        raise BadInput(
            f"{name} {list(_shape(x))} split over {axis!r}: it has no dimension {dimension}; it has {rank}, "
            f"counted from 0: {written(_split_that_works(_shape(x), axis))} would work"
        )
    whole: tuple[Entry, ...] = ((),) * rank
    place = dimension % rank
    return _annotated(x, (*whole[:place], (axis,), *whole[place + 1 :]), RULES, uneven, name)


def shard(
    x: X,
    spec: str | PartitionSpec | np.ndarray,
    rules: Rules = RULES,
    *,
    uneven: bool = False,
    name: str = "array",
) -> X:
    """Lay ``x`` out by logical names (``"batch time model"``), by mesh axes, or by device.

    Args:
        x: an array, Variable or ShapeDtypeStruct.
        spec: logical names, one a dimension; a PartitionSpec of mesh axes; or a device assignment, an integer array of
            x's rank with the device id of each piece, which needs no mesh
            (:func:`gshardx.sharding.assignment.assigned_sharding`).
        rules: where logical names live.
        uneven: GShard's padding: dimensions of an array inside jit need not divide. The shape stays; XLA pads the last
            piece and masks it. What crosses jit's boundary must divide all the same.
        name: what errors call ``x``.

    Raises:
        BadInput: as :func:`gshardx.sharding.partition_spec` and ``assigned_sharding``; or an order of devices that no
            spec of the mesh of ``jax.set_mesh`` has.
    """
    if isinstance(spec, np.ndarray):
        return _assigned(x, spec, uneven, name)
    entries = tuple(spec.split()) if isinstance(spec, str) else entries_of(spec, len(_shape(x)))
    return _annotated(x, entries, rules, uneven, name)


def reshard(x: Array, from_: str, to: str, rules: Rules = RULES, *, name: str = "array") -> Array:
    """Move ``x`` from one layout to another, in the forward pass and, mirrored, in the backward pass.

    A single constraint fixes only one side of the boundary, and the partitioner then gathers in the backward pass
    (tests/sharding/test_annotate.py counts it). With both sides fixed the transpose has both too, and group-split <->
    expert-split is an all-to-all in both directions and nothing else. ``name`` is what errors call ``x``.
    """
    return shard(shard(x, from_, rules, name=name), to, rules, name=name)


def manual(
    function: Callable[..., Any],
    in_axes: Sequence[str],
    out_axes: str | tuple[str, ...],
    rules: Rules = RULES,
    *,
    axes: Sequence[str] | None = None,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """Run ``function`` on each device with its own shards: GShard's auto-to-manual partition (arXiv 2006.16668 section
    3.2), over ``jax.shard_map``. Without a mesh, ``function`` itself.

    Args:
        function: sees local shapes along the manual axes; collectives inside name them.
        in_axes: logical names of each argument's leading dimensions; an argument may be a pytree whose leaves share
            them.
        out_axes: of the result, or one for each of several.
        rules: where the names live.
        axes: the mesh axes that become manual; None makes all so. Along the others shapes stay whole, the partitioner
            goes on, and annotations inside ``function`` hold. Call it inside jit then.
        check_vma: let shard_map check what differs between devices; kernels written in Pallas do not say.

    Raises:
        BadInput: the mesh lacks one of ``axes``, or a name has no rule; when called, an argument that does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    for axis in axes or ():
        if axis not in mesh.shape:
            raise BadInput(
                f"manual over {', '.join(axes or ())}: the mesh has no axis {axis!r}; it has {', '.join(mesh.shape)}; "
                f"did you mean {nearest(axis, mesh.shape)!r}?"
            )
    ins = tuple(unchecked_spec(names.split(), mesh, rules, axes) for names in in_axes)
    out = jax.tree.map(lambda names: unchecked_spec(names.split(), mesh, rules, axes), out_axes)
    on_each = jax.shard_map(
        function, in_specs=ins, out_specs=out, axis_names=frozenset(axes or mesh.axis_names), check_vma=check_vma
    )

    def checked(*arguments: Any) -> Any:
        for number, (argument, names, spec) in enumerate(zip(arguments, in_axes, ins, strict=False), 1):
            for leaf in jax.tree.leaves(argument):
                _check_shares(np.shape(leaf), names, spec, mesh, f"argument {number} of manual")
        return on_each(*arguments)

    return checked


def _check_shares(shape: tuple[int, ...], names: str, spec: PartitionSpec, mesh: AbstractMesh, name: str) -> None:
    """Raise BadInput where devices can't have equal shares."""
    labels = names.split()
    for label, size, axes in zip(labels, shape, entries_of(spec, len(labels)), strict=False):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            more = -(-size // parts) * parts
            over = f"{label} = {size} does not divide over mesh axis {'*'.join(axes)} = {parts}"
            raise BadInput(
                f"{name} {list(shape)} ({names}): {over}; pad it to {more}, or give it a name that lives elsewhere"
            )


def axis_size(axis: str) -> int:
    """Devices along a mesh axis of the context; 1 without a mesh or without that axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape.get(axis, 1))


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _split_that_works(shape: tuple[int, ...], axis: str) -> PartitionSpec:
    """Of the first dimension that ``axis`` divides, or of none."""
    mesh = jax.sharding.get_abstract_mesh()
    specs = [working_spec([()] * dimension + [(axis,)], shape, mesh) for dimension in range(len(shape))]
    return next((spec for spec in specs if any(spec)), working_spec((), shape, mesh))


def _annotated(x: Any, entries: tuple[Entry, ...], rules: Rules, uneven: bool, name: str) -> Any:
    if isinstance(x, nnx.Variable):
        return _remembering(x, entries, rules, name)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    inside = isinstance(x, jax.core.Tracer)
    if not inside:
        _refuse_unconstrained(x, entries, name)
    spec = partition_spec(entries, x.shape, mesh, rules, name, uneven=uneven and inside)
    if inside:
        return jax.lax.with_sharding_constraint(x, spec)
    return _placed(x, NamedSharding(get_concrete_mesh(), spec))


def _placed(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    return jax.device_put(x, sharding)


def _refuse_unconstrained(x: Any, entries: tuple[Entry, ...], name: str) -> None:
    if PartitionSpec.UNCONSTRAINED in entries:
        spec = written([() if entry is PartitionSpec.UNCONSTRAINED else entry for entry in entries])
        raise BadInput(
            f"{name} {list(_shape(x))} ({written(entries)}): what does not live inside jit has a place in full; "
            f"{spec} would work"
        )


def _remembering(x: nnx.Variable[Any], entries: tuple[Entry, ...], rules: Rules, name: str) -> nnx.Variable[Any]:
    """A Variable like ``x`` with its layout in the metadata ``axes``, and in ``rules`` unless those are RULES."""
    _refuse_unconstrained(x, entries, name)
    named = tuple(entry if isinstance(entry, str) else () for entry in entries)
    partition_spec(named, x.shape, AbstractMesh((), ()), rules, name)  # what needs no mesh to be wrong
    known: dict[str, Any] = {"axes": entries}
    if rules is not RULES:
        known["rules"] = tuple((entry, rules[entry]) for entry in entries if isinstance(entry, str))
    value = _annotated(x.get_value(), entries, rules, False, name)
    return type(x).from_metadata(value, {**x.get_metadata(), **known})


def _assigned(x: Any, ids: np.ndarray, uneven: bool, name: str) -> Any:
    mesh = get_concrete_mesh()
    inside = isinstance(x, jax.core.Tracer)
    sharding = assigned_sharding(ids, _shape(x), mesh, name, uneven=uneven and inside)
    own = sharding.mesh != mesh
    where = f"{name} {list(_shape(x))} (device assignment of shape {list(ids.shape)})"
    if isinstance(x, nnx.Variable):
        if own:
            raise BadInput(
                f"{where}: a parameter remembers axes of the mesh of jax.set_mesh, and no spec of them says the same; "
                f"{written(PartitionSpec(*[None] * ids.ndim))} would work"
            )
        return _remembering(x, entries_of(sharding.spec, ids.ndim), RULES, name)
    if own and not mesh.empty and list(sharding.mesh.devices.flat) != list(mesh.devices.flat):
        raise BadInput(
            f"{where}: JAX keeps the device order of the mesh of jax.set_mesh, and no spec of it gives this order; "
            f"the {mesh.size} device ids in the shape {list(ids.shape)}, in the mesh's order, would work"
        )
    return jax.lax.with_sharding_constraint(x, sharding) if inside else _placed(x, sharding)
