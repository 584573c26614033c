"""A directory in the hub's layout: its config.json understood, and every tensor where the model wants it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from gshardx.checkpoint.manifest import Shapes
from gshardx.checkpoint.store import array_shapes
from gshardx.config import ModelConfig
from gshardx.convert.families import family_of
from gshardx.convert.family import Family
from gshardx.convert.rules import STATE, Leaf, Piece, pieces
from gshardx.convert.settings import find, read_settings
from gshardx.convert.tensors import Tensors, open_tensors
from gshardx.errors import BadInput
from gshardx.models.build import Blueprint, blueprint
from gshardx.models.items import items_of

ITEM = "params"
COMPUTED: dict[str, Literal["float32", "bfloat16"]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
}
"""Type that a model computes in, by the type in config.json."""

NOT_LEARNED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Tensors of older files that follow from config.json."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model of a family: its parameters and its routers' state, and the tensors that they are there.

    Attributes:
        plan: the model.
        pieces: in the order in which they are written.
        zeros: leaves that no tensor has.
    """

    family: Family
    plan: Blueprint
    shapes: Shapes
    pieces: list[Piece]
    zeros: list[Leaf]

    def chunk(self, name: str) -> list[int]:
        """What of a parameter one tensor has, as a shape."""
        rank = next((len(leaf.at) for piece in self.pieces for leaf in piece.leaves if leaf.name == name), 0)
        return [1] * rank + self.shapes[name][0][rank:]


def array_of(name: str, item: str = ITEM) -> str:
    """Where a step has what a leaf names."""
    return name.replace(".", "/", 1) if name.startswith(STATE) else f"{item}/{name}"


def layout_of(family: Family, model: ModelConfig, vocab: int, mesh: Mesh) -> Layout:
    """Raises:
    BadInput: the family has no tensor for a parameter of the model.
    """
    plan = blueprint(model, vocab, mesh)
    arrays = array_shapes(items_of(plan.variables)).items()
    shapes = {name.removeprefix(f"{ITEM}/").replace("/", "."): about for name, about in arrays}
    zeros = [Leaf(name, ()) for name in family.zeros if name in shapes]
    there = {name: about for name, about in shapes.items() if name not in family.zeros}
    return Layout(family, plan, shapes, pieces(family.rules, model, vocab, there), zeros)


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened directory. ``config``: the content of its config.json; ``model``: what it says."""

    folder: Path
    config: dict[str, Any]
    family: Family
    model: ModelConfig
    tensors: Tensors

    @property
    def vocab(self) -> int:
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def after(self) -> Tensors:
        """Tensors of layers after the model's last: they predict later tokens, and are kept and not used."""
        count = find(self.config, self.family.layers_after) or 0 if self.family.layers_after else 0
        front = tuple(f"model.layers.{self.model.layers + extra}." for extra in range(count))
        return Tensors({name: tensor for name, tensor in self.tensors.by_name.items() if name.startswith(front)})

    def layout(self, mesh: Mesh) -> Layout:
        """Raises:
        BadInput: the files have a tensor more or less than the model, or one of another shape.
        """
        layout = layout_of(self.family, self.model, self.vocab, mesh)
        check(layout.pieces, self.tensors, self.folder, self.after)
        return layout

    def read(self, piece: Piece) -> dict[Leaf, np.ndarray]:
        """What a tensor holds."""
        return piece.inwards(self.tensors.read(piece.name))


def open_source(folder: Path) -> Source:
    """Raises:
    BadInput: no such directory, an architecture or option that we lack, or damaged files.
    """
    config = read_config(folder)
    family = family_of(config, f"{folder / 'config.json'}")
    model = understood(config, family, f"{folder / 'config.json'}")
    return Source(folder, config, family, model, open_tensors(folder))


def read_config(place: Path) -> dict[str, Any]:
    """The content of a folder's config.json, or of such a file.

    Raises:
        BadInput: none there, or no JSON.
    """
    path = place if place.is_file() else place / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}); give a directory in the hub's layout") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON; fetch it again") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: not a mapping; fetch it again")
    return config


def understood(config: dict[str, Any], family: Family, where: str) -> ModelConfig:
    """The model that a config.json of ``family`` describes; raises BadInput as :func:`read_settings`."""
    model = read_settings(config, family.settings, family.needs, family.fixed, where)
    computed = COMPUTED.get(str(find(config, "torch_dtype|dtype") or "float32").removeprefix("torch."), "float32")
    return dataclasses.replace(model, dtype=computed)


def check(wanted: list[Piece], tensors: Tensors, folder: Path, beside: Tensors) -> None:
    """Raise BadInput unless the files hold the wanted tensors, in their shapes, and no others but those ``beside``."""
    found = tensors.by_name
    names = {piece.name for piece in wanted} | beside.by_name.keys()
    missing = [piece for piece in wanted if piece.name not in found]
    extra = sorted(name for name in found.keys() - names if not re.fullmatch(NOT_LEARNED, name))
    wrong = [piece for piece in wanted if piece.name in found and found[piece.name].shape != piece.shape]
    if missing:
        rest = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise BadInput(f"{folder}: no tensor {missing[0].name} {list(missing[0].shape)}{rest}; config.json asks for it")
    if extra:
        rest = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise BadInput(
            f"{folder}: tensor {extra[0]} {list(found[extra[0]].shape)}{rest} has no place in the model that "
            f"config.json describes; is it its own?"
        )
    if wrong:
        piece = wrong[0]
        raise BadInput(
            f"{found[piece.name].file}: {piece.name} is {list(found[piece.name].shape)}, and config.json makes it "
            f"{list(piece.shape)}; is it its own?"
        )
