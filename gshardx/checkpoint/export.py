"""A run without what only training needs: its weights, the routers' state, config and tokenizer."""

import os
import shutil
from pathlib import Path

from gshardx.checkpoint.arrays import FLOATS, convert
from gshardx.checkpoint.manifest import Shapes, array_of, damage, write_manifest
from gshardx.checkpoint.places import Saved
from gshardx.errors import BadInput

KEPT = ("config.yaml", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of a run that inference reads, where they are."""


def export(saved: Saved, target: Path, items: tuple[str, ...], dtype: str | None) -> Shapes:
    """Write a run directory with these items of one step; returns what arrays it holds.

    Array by array: in memory is no more than a piece of one. What was interrupted is not taken for a checkpoint.

    Args:
        saved: where from; its files are checked first.
        target: a directory that is empty or not there.
        items: those that the step does not have are left out.
        dtype: of all arrays of floats, one of :data:`gshardx.checkpoint.arrays.FLOATS`; None: as they are.

    Raises:
        BadInput: damaged files, or a target that holds something.
    """
    below = tuple(f"{item}/" for item in items)
    if bad := damage(saved.folder, saved.manifest, below):
        raise BadInput(f"{saved.folder}: {bad}; choose another --step")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target}: not empty; give a directory that is not there")
    folder = target / "checkpoints" / str(saved.step)
    arrays = {name: about for name, about in saved.manifest.arrays.items() if name.startswith(below)}
    changed = {name for name, (_, kind) in arrays.items() if dtype is not None and kind in FLOATS and kind != dtype}
    try:
        folder.mkdir(parents=True)
        for name in KEPT:
            if (saved.run / name).is_file():
                shutil.copyfile(saved.run / name, target / name)
        for name in saved.manifest.files:
            if (name.startswith(below) or "/" not in name) and array_of(name) not in changed:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(saved.folder / name, folder / name)
        for name in sorted(changed):
            assert dtype is not None
            convert(saved.folder, name, folder, dtype)
        shapes = {name: (shape, dtype if name in changed and dtype else kind) for name, (shape, kind) in arrays.items()}
        write_manifest(folder, shapes, saved.manifest.extra)
    except OSError as error:
        raise BadInput(f"{target}: can't be written ({os.strerror(error.errno or 0)})") from error
    return shapes
