"""What a parameter is to an optimizer, read from the names of its dimensions.

Names say it where shapes can't: a router's kernel ``embed router`` has two dimensions like any matrix, and of a stack
``layer expert embed hidden`` the two largest may well be layers and experts. Parameters are written inputs first
(``x @ w``), which is how their einsums read.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import jax

from gshardx.models.build import Params

Names = tuple[Any, ...]
"""Of one parameter's dimensions, as in ``Blueprint.axes``."""

STACKED = ("layer", "expert")
"""Dimensions that count parameters of one kind."""
_HEADS = ("heads", "kv_heads", "head_dim")


class Matrix(NamedTuple):
    """The dimensions of a parameter that are a matrix; each index of the others has a matrix of its own."""

    inputs: tuple[int, ...]
    """Those that its product sums over."""
    outputs: tuple[int, ...]


def own_dimensions(names: Names) -> tuple[int, ...]:
    """The dimensions that are not stacked."""
    return tuple(at for at, name in enumerate(names) if name not in STACKED)


def matrix_of(names: Names) -> Matrix | None:
    """Of a parameter that is one matrix or a stack of them.

    Heads and their width are one side of it together: queries, ``embed heads head_dim``, are a matrix of ``embed`` by
    ``heads * head_dim``, and the output, ``heads head_dim embed``, one of ``heads * head_dim`` by ``embed``. None for
    vectors, stacked or not.
    """
    found = _sides(names)
    return Matrix(*found) if len(found) == 2 else None


def _sides(names: Names) -> list[tuple[int, ...]]:
    """The dimensions that are not stacked; heads and their width count as one."""
    sides = groupby(own_dimensions(names), lambda at: "heads" if names[at] in _HEADS else at)
    return [tuple(side) for _, side in sides]


def is_router(names: Names) -> bool:
    """Kernels and biases that score experts, and those that weigh a shared network (PR-MoE)."""
    return "router" in names


def is_hidden_matrix(names: Names) -> bool:
    """Matrices inside the network: no embedding, no logits, no router."""
    return matrix_of(names) is not None and "vocab" not in names and not is_router(names)


def decays(names: Names) -> bool:
    """Whether weight decay applies: to all but norms, biases and other vectors, and routers.

    A norm's scale belongs at 1, a bias may be any size, and decay of a router pulls the scores of all experts together.
    """
    return len(_sides(names)) > 1 and not is_router(names)


def by_names(rule: Callable[[Names], Any], axes: Params) -> Any:
    """``rule`` of each parameter's names: a tree like the parameters."""
    return jax.tree.map(rule, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
