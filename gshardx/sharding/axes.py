"""Logical axes: the names that tensors' dimensions carry, and the mesh axes they live on."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput

Rules = Mapping[str, tuple[str, ...]]

Entry: TypeAlias = str | tuple[str, ...] | Any
"""What one dimension carries: a logical name, mesh axes as they stand (``()``: whole), or
``PartitionSpec.UNCONSTRAINED``, which leaves it to the partitioner."""

RULES: Rules = {
    # activations
    "batch": ("data", "fsdp", "expert"),  # rows of a batch, and GShard's groups of tokens
    "micro": (),  # micro-batches, which follow each other
    "time": (),
    "model": (),
    "group": ("data", "fsdp", "expert"),
    "token": (),
    "expert_group": ("data", "fsdp"),  # groups of a tensor whose expert axis is split
    "slot": (),
    "choice": (),
    "experts_here": (),  # all experts, on the device whose groups chose them
    # parameters, and the activations that share their axes
    "layer": (),
    "embed": ("fsdp",),  # a parameter's model axis
    "expert": ("expert",),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),  # what several heads are compressed to, which all of them read
    "vocab": ("tensor",),
    "router": (),  # a router's expert axis: every device scores all experts
}
"""Where each logical axis lives. Change a row to try another layout."""


def partition_spec(
    names: Sequence[Entry],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
    tensor: str = "tensor",
    *,
    uneven: bool = False,
) -> PartitionSpec:
    """Translate entries, one a dimension, into a PartitionSpec for ``mesh``.

    Of a logical name's mesh axes those are left out that ``mesh`` lacks, so that the same names serve a mesh of fewer
    axes, and those that are manual where the call is traced (:func:`gshardx.sharding.manual`), whose share a device
    already has.

    Args:
        uneven: let dimensions be that do not divide.

    Raises:
        BadInput: an unknown name, an unknown mesh axis, a rank mismatch, two dimensions on one mesh axis, or a
            dimension that does not divide. The message names ``tensor``, its shape, the axes and what would work.
    """
    where = f"{tensor} {list(shape)} ({written(names)})"
    works = f"{written(working_spec(names, shape, mesh, rules))} would work"
    if len(names) != len(shape):
        counted = f"{len(names)} axis names for {len(shape)} dimensions"
        raise BadInput(f"{where}: {counted}; give one name a dimension: {works}")
    spec: list[Any] = []
    taken: dict[str, str] = {}
    for dimension, (entry, size) in enumerate(zip(names, shape, strict=True)):
        if entry is PartitionSpec.UNCONSTRAINED:
            spec.append(entry)
            continue
        label = entry if isinstance(entry, str) else f"dimension {dimension}"
        axes = _mesh_axes(entry, mesh, rules, where, works)
        for axis in axes:
            if axis in taken:
                both = f"{taken[axis]} and {label} both live on mesh axis {axis!r}"
                raise BadInput(f"{where}: {both}; give one of them another axis, or leave it whole: {works}")
            taken[axis] = label
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts and not uneven:
            raise BadInput(f"{where}: {label} = {size} {_indivisible(size, parts, '*'.join(axes), works)}")
        spec.append(axes or None)
    return PartitionSpec(*spec)


def _indivisible(size: int, parts: int, axis: str, works: str) -> str:
    fits = ", ".join(str(n) for n in range(1, min(size, 2 * parts) + 1) if size % n == 0)
    return (
        f"does not divide over mesh axis {axis} = {parts}; pad it to {-(-size // parts) * parts} "
        f"(inside jit, uneven=True does); {works}; or use a mesh axis of {fits}"
    )


def unchecked_spec(
    names: Sequence[str], mesh: Mesh | AbstractMesh, rules: Rules = RULES, among: Iterable[str] | None = None
) -> PartitionSpec:
    """The PartitionSpec of leading dimensions named ``names``, for arrays whose shape was checked before.

    Args:
        among: leave out mesh axes other than these; None leaves out none.

    Raises:
        BadInput: a name has no rule, or two names live on one mesh axis.
    """
    where = f"({written(names)})"
    found = [_mesh_axes(name, mesh, rules, where) for name in names]
    taken = [axis for axes in found for axis in axes]
    for axis in taken:
        if taken.count(axis) > 1:
            both = " and ".join(name for name, axes in zip(names, found, strict=True) if axis in axes)
            raise BadInput(f"{where}: {both} both live on mesh axis {axis!r}; give one of them another name")
    return PartitionSpec(*(tuple(a for a in axes if among is None or a in among) or None for axes in found))


def working_spec(
    names: Sequence[Entry], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules = RULES
) -> PartitionSpec:
    """The spec nearest to the one asked for that an array of ``shape`` can have on ``mesh``.

    Unknown names give way to the nearest known ones; of each dimension's mesh axes those stay that are free and divide.
    """
    spec: list[tuple[str, ...] | None] = []
    free = [axis for axis, parts in mesh.shape.items() if parts > 1 and axis not in mesh.manual_axes]
    for entry, size in zip((*names, *[()] * len(shape)), shape, strict=False):
        kept: tuple[str, ...] = ()
        for wanted in _wanted(entry, rules) if free else ():
            axis = wanted if wanted in mesh.shape or isinstance(entry, str) else nearest(wanted, mesh.shape)
            if axis in free and size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
                kept = (*kept, axis)
                free.remove(axis)
        spec.append(kept or None)
    return PartitionSpec(*spec)


def entries_of(spec: PartitionSpec, rank: int) -> tuple[Entry, ...]:
    """A PartitionSpec as entries; dimensions that it does not reach are whole."""
    entries = tuple(() if e is None else (e,) if isinstance(e, str) else e for e in spec)
    return (*entries, *[()] * (rank - len(entries)))


def written(names: Sequence[Entry] | PartitionSpec) -> str:
    """Entries as a person would write them: as names where there are any, else as ``PartitionSpec(...)``."""
    entries = entries_of(names, 0) if isinstance(names, PartitionSpec) else names
    words = [_word(entry) for entry in entries]
    named = any(isinstance(entry, str) for entry in entries)
    return " ".join(words) if named else f"PartitionSpec({', '.join(words)})"


def _word(entry: Entry) -> str:
    if entry is PartitionSpec.UNCONSTRAINED:
        return "PartitionSpec.UNCONSTRAINED"
    return entry if isinstance(entry, str) else repr(entry[0] if len(entry) == 1 else entry or None)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like ``word``."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def variable_axes(variable: nnx.Variable[Any], tensor: str) -> tuple[Entry, ...]:
    """What an annotated Variable remembers of its layout: one entry a dimension.

    A Variable that Flax itself annotated (``nnx.with_partitioning``) is understood too, as mesh axes.

    Raises:
        BadInput: nothing was said about it.
    """
    metadata = variable.get_metadata()
    if "axes" in metadata:
        axes: tuple[Entry, ...] = metadata["axes"]
        return axes
    if metadata.get("out_sharding") is not None:
        return entries_of(PartitionSpec(*metadata["out_sharding"]), len(variable.shape))
    raise BadInput(
        f"{tensor} {list(variable.shape)}: no layout was given where it is made; wrap it in replicate, split or shard "
        f"of gshardx.sharding: {written(PartitionSpec(*[None] * len(variable.shape)))} would work"
    )


def variable_spec(variable: nnx.Variable[Any], mesh: Mesh | AbstractMesh, tensor: str) -> PartitionSpec:
    """Where an annotated Variable lives on ``mesh``.

    Raises:
        BadInput: as :func:`partition_spec` and :func:`variable_axes`.
    """
    rules = {**RULES, **dict(variable.get_metadata().get("rules", ()))}
    return partition_spec(variable_axes(variable, tensor), variable.shape, mesh, rules, tensor)


def _wanted(entry: Entry, rules: Rules) -> tuple[str, ...]:
    """The mesh axes that ``entry`` speaks of, whether they exist or not."""
    if entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return rules[entry if entry in rules else nearest(entry, rules)] if isinstance(entry, str) else tuple(entry)


def _mesh_axes(entry: Entry, mesh: Mesh | AbstractMesh, rules: Rules, where: str, works: str = "") -> tuple[str, ...]:
    mend = f"; {works}" if works else ""
    if isinstance(entry, str):
        if entry not in rules:
            raise BadInput(f"{where}: no rule for axis {entry!r}; did you mean {nearest(entry, rules)!r}?{mend}")
        return tuple(a for a in rules[entry] if mesh.shape.get(a, 1) > 1 and a not in mesh.manual_axes)
    for axis in entry:
        if axis not in mesh.shape:
            raise BadInput(
                f"{where}: the mesh has no axis {axis!r}; it has {', '.join(mesh.shape)}; "
                f"did you mean {nearest(axis, mesh.shape)!r}?{mend}"
            )
        if axis in mesh.manual_axes:
            raise BadInput(f"{where}: mesh axis {axis!r} is manual here, so each device has its own share{mend}")
    return tuple(entry)


def abstract_array(
    shape: Sequence[int], dtype: Any, names: Sequence[Entry], mesh: Mesh, rules: Rules = RULES, tensor: str = "tensor"
) -> Any:
    """The shape, dtype and place of an array that does not exist: stands for one in abstract pytrees.

    Raises:
        BadInput: as :func:`partition_spec`.
    """
    sharding = NamedSharding(mesh, partition_spec(names, shape, mesh, rules, tensor))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's pieces of a pytree of arrays, abstract or real."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
