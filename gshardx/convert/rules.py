"""Where each tensor of a public checkpoint goes: rules as data, and what they say for one model.

A rule is a tensor's name there, parameters' names here, and an einops pattern between them, which read backwards is the
way out. Its letters are those of docs/design.md; f: hidden units of a dense block, s: of a shared network, p: the
parameters that one tensor holds. Of latent attention, a: q_rank, r: kv_rank, k: what is kept of a token, c: a head's
query, u: its key before it turns and value, w: its value.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import einops
import numpy as np

from gshardx.checkpoint.manifest import Shapes
from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.models.attention import kept as kept_of
from gshardx.models.attention import widths

STATE = "router."
"""Before the number of a leaf of the routers' state, ``[moe_layer, e]``: a name like a parameter's."""


class Rule(NamedTuple):
    """One kind of tensor.

    Attributes:
        there: its name; {layer} and {expert} are counted.
        pattern: its dimensions, as torch has them, and ours: ``(n d) m -> m n d``. With several parameters ours start
            with p.
        here: parameters. ``block.`` is each layer, ``sparse.`` each with experts, ``dense.`` each without. ``state.0``
            is the first leaf of the state of a router.
    """

    there: str
    pattern: str
    here: tuple[str, ...]


class Leaf(NamedTuple):
    """A parameter, or what one layer or expert has of it."""

    name: str
    at: tuple[int, ...]


class Piece(NamedTuple):
    """One tensor and the leaves that it holds."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    sizes: tuple[tuple[str, int], ...]
    leaves: tuple[Leaf, ...]

    def inwards(self, tensor: np.ndarray) -> dict[Leaf, np.ndarray]:
        """Each leaf's values."""
        ours = einops.rearrange(tensor, self.pattern, **dict(self.sizes))
        return dict(zip(self.leaves, ours if len(self.leaves) > 1 else [ours], strict=True))

    def outwards(self, values: Mapping[Leaf, np.ndarray]) -> np.ndarray:
        """The tensor."""
        ours = [values[leaf] for leaf in self.leaves]
        theirs, mine = (side.strip() for side in self.pattern.split("->"))
        whole = np.stack(ours) if len(ours) > 1 else ours[0]
        return einops.rearrange(whole, f"{mine} -> {theirs}", **dict(self.sizes))


def sizes_of(model: ModelConfig, vocab: int) -> dict[str, int]:
    """Of every letter that a pattern may use."""
    moe = model.moe
    sizes = {
        "m": model.width, "n": model.heads, "q": model.kv_heads, "d": model.head_dim, "v": vocab, "f": model.hidden,
        "e": moe.num_experts, "h": moe.hidden, "s": moe.shared_hidden,
    }  # fmt: skip
    if model.grouped_heads:
        return sizes
    rank, kept, (query, value) = model.attention["kv_rank"], kept_of(model).width, widths(model)
    unturned = query - (kept - rank)
    of_latent = {"a": model.attention.get("q_rank") or 0, "r": rank, "k": kept, "c": query, "u": unturned + value}
    return sizes | of_latent | {"w": value}


def pieces(rules: Iterable[Rule], model: ModelConfig, vocab: int, shapes: Shapes) -> list[Piece]:
    """What the rules come to for a model whose parameters are ``shapes``; a rule of parameters that it lacks is void.

    Raises:
        BadInput: there is no tensor for one of them.
    """
    found = [piece for rule in rules for piece in _of_rule(rule, model, vocab, shapes)]
    filled: dict[str, int] = {}
    for piece in found:
        for leaf in piece.leaves:
            filled[leaf.name] = filled.get(leaf.name, 0) + int(np.prod(shapes[leaf.name][0][len(leaf.at) :]))
    for name, (shape, _) in shapes.items():
        if filled.get(name, 0) != int(np.prod(shape)):
            raise BadInput(f"{name} {shape}: checkpoints of this architecture have no such tensor; use another")
    return found


class Spot(NamedTuple):
    """Where a layer's parameters are: names start with ``block``, and have the layer at ``at``."""

    block: str
    at: tuple[int, ...]
    sparse: bool


def spot_of(model: ModelConfig, layer: int) -> Spot:
    """A layer among dense first ones and stacked units."""
    every, first = model.moe.every, model.moe.dense_first
    if layer < first:
        return Spot(f"first.{layer}", (), False)
    unit, offset = divmod(layer - first, every)
    sparse = offset == every - 1
    return Spot("stack.units." + ("sparse" if sparse else f"dense.{offset}"), (unit,), sparse)


def _of_rule(rule: Rule, model: ModelConfig, vocab: int, shapes: Shapes) -> Iterator[Piece]:
    sizes = sizes_of(model, vocab) | {"p": len(rule.here)}
    theirs, _ = rule.pattern.split("->")
    used = tuple((letter, sizes[letter]) for letter in sorted(set(re.findall(r"[a-z]", rule.pattern))))
    shape = tuple(
        int(np.prod([sizes[letter] if letter != "1" else 1 for letter in group.strip("()").split()]))
        for group in re.findall(r"\([^)]*\)|\S+", theirs)
    )
    in_layers, counted = "{layer}" in rule.there, "{expert}" in rule.there
    for layer in range(model.layers) if in_layers else [0]:
        spot = spot_of(model, layer) if in_layers else Spot("", (), False)
        names = tuple(_in_block(name, spot.block, spot.sparse) if in_layers else name for name in rule.here)
        if not all(name in shapes for name in names):
            continue
        for expert in range(model.moe.num_experts) if counted else [0]:
            index = (*spot.at, expert) if counted else spot.at
            there = rule.there.format(layer=layer, expert=expert)
            yield Piece(there, shape, rule.pattern, used, tuple(Leaf(name, index) for name in names))


def _in_block(name: str, block: str, sparse: bool) -> str:
    """A parameter's full name, or none that exists where the block is of the other kind."""
    kind, _, rest = name.partition(".")
    if kind == "state":
        return f"{STATE}{rest}" if sparse else ""
    return f"{block}.{rest}" if kind == "block" or sparse == (kind == "sparse") else ""
