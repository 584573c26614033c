"""Steps that hold no numbers yet, to be filled array by array: no mesh, little memory."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gshardx.checkpoint.arrays import create
from gshardx.checkpoint.manifest import NAME, Shapes
from gshardx.checkpoint.store import CheckpointStore, Items, array_shapes


def write_empty(folder: Path, step: int, items: Items, dtypes: Mapping[str, str], chunks: Mapping[str, Any]) -> Shapes:
    """A step of ``items``, all of it but numbers and manifest; returns what arrays it is to hold.

    The store saves arrays of one entry each, and these are replaced by empty ones of the right shape.

    Args:
        folder: RUN_DIR/checkpoints.
        step: its number.
        items: abstract arrays.
        dtypes: of an array by name, such as ``params/final_norm.scale``.
        chunks: shape of an array's chunks, each a file.
    """
    store = CheckpointStore(folder, every=1, keep=2)
    store.save(step, jax.tree.map(lambda array: jnp.zeros((1,) * len(array.shape), array.dtype), items))
    store.close()
    place = folder / str(step)
    (place / NAME).unlink()
    for item in items:  # what these say of the arrays' shapes is not needed to read them
        shutil.rmtree(place / item / "array_metadatas", ignore_errors=True)
        (place / item / "_sharding").unlink(missing_ok=True)
    shapes = held_by(items, dtypes)
    for name, (shape, dtype) in shapes.items():
        shutil.rmtree(place / name)
        create(place, name, shape, dtype, chunks[name])
    return shapes


def held_by(items: Items, dtypes: Mapping[str, str]) -> Shapes:
    """What arrays such a step holds."""
    return {name: (shape, dtypes[name]) for name, (shape, _) in array_shapes(items).items()}
