"""Logical axes: the names that tensors' dimensions carry, and the mesh axes they live on."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    # activations
    "batch": ("data", "fsdp", "expert"),  # rows of a batch, and GShard's groups of tokens
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
    "vocab": ("tensor",),
    "router": (),  # a router's expert axis: every device scores all experts
}
"""Where each logical axis lives. Change a row to try another layout."""


def partition_spec(
    names: Sequence[str],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
    tensor: str = "tensor",
) -> PartitionSpec:
    """Translate logical names, one a dimension, into a PartitionSpec for ``mesh``.

    Mesh axes that ``mesh`` lacks are left out, so that the same names serve a mesh of fewer axes.

    Raises:
        BadInput: an unknown name, a rank mismatch, two dimensions on one mesh axis, or a dimension that does not
            divide. The message names ``tensor``, its shape, the axes and what would work.
    """
    where = f"{tensor} {list(shape)} ({' '.join(names)})"
    if len(names) != len(shape):
        raise BadInput(f"{where}: {len(names)} axis names for {len(shape)} dimensions; give one name a dimension")
    spec: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name not in rules:
            nearest = difflib.get_close_matches(name, rules, n=1, cutoff=0.0)[0]
            raise BadInput(f"{where}: no rule for axis {name!r}; did you mean {nearest!r}?")
        axes = _mesh_axes(name, mesh, rules)
        for axis in axes:
            if axis in taken:
                raise BadInput(
                    f"{where}: {taken[axis]!r} and {name!r} both live on mesh axis {axis!r}; "
                    f"give one of them another rule, or replicate it"
                )
            taken[axis] = name
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            fits = ", ".join(str(n) for n in range(1, min(size, 2 * parts) + 1) if size % n == 0)
            raise BadInput(
                f"{where}: {name} = {size} does not divide over mesh axis {'*'.join(axes)} = {parts}; "
                f"use a mesh axis of {fits}"
            )
        spec.append(axes or None)
    return PartitionSpec(*spec)


def unchecked_spec(names: Sequence[str], mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of leading dimensions named ``names``, for arrays whose shape was checked before."""
    return PartitionSpec(*(_mesh_axes(name, mesh, rules) or None for name in names))


def _mesh_axes(name: str, mesh: Mesh | AbstractMesh, rules: Rules) -> tuple[str, ...]:
    return tuple(axis for axis in rules[name] if mesh.shape.get(axis, 1) > 1)


def abstract_array(
    shape: Sequence[int], dtype: Any, names: Sequence[str], mesh: Mesh, rules: Rules = RULES, tensor: str = "tensor"
) -> Any:
    """The shape, dtype and place of an array that does not exist: stands for one in abstract pytrees.

    Raises:
        BadInput: as :func:`partition_spec`.
    """
    sharding = NamedSharding(mesh, partition_spec(names, shape, mesh, rules, tensor))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
