"""A run without what only training needs: its weights, the routers' state, config and tokenizer."""

import shutil
from pathlib import Path

from gshardx.checkpoint.arrays import FLOATS, convert
from gshardx.checkpoint.beside import written_beside
from gshardx.checkpoint.manifest import Shapes, array_of, damage, write_manifest
from gshardx.checkpoint.places import Saved
from gshardx.errors import BadInput

KEPT = ("config.yaml", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of a run that inference reads, where they are."""


def export(saved: Saved, target: Path, items: tuple[str, ...], dtype: str | None) -> Shapes:
    """Write a run directory with these items of one step; returns what arrays it holds.

    Array by array: in memory is no more than a piece of one. It is written beside ``target``, in .NAME.part, and gets
    its name last: there is all of it, or nothing. The part of a killed export is replaced by the next one.

    Args:
        saved: where from; its files are checked first.
        target: a directory that is empty or not there.
        items: those that the step does not have are left out.
        dtype: of all arrays of floats, one of :data:`gshardx.checkpoint.arrays.FLOATS`; None: as they are.

    Raises:
        BadInput: damaged files, or a target that holds something or can't be written.
    """
    below = tuple(f"{item}/" for item in items)
    if bad := damage(saved.folder, saved.manifest.checksum, saved.manifest.below(*items)):
        raise BadInput(f"{saved.folder}: {bad}; choose another --step")
    with written_beside(target, "OUT_DIR", "exports to it") as run:
        return _write(saved, run, below, dtype)


def _write(saved: Saved, run: Path, below: tuple[str, ...], dtype: str | None) -> Shapes:
    """The run directory itself; ``below``: prefixes of the arrays to take."""
    found = {name: about for name, about in saved.manifest.arrays.items() if name.startswith(below)}
    shapes = {name: (shape, dtype if dtype and kind in FLOATS else kind) for name, (shape, kind) in found.items()}
    changed = {name for name in found if shapes[name] != found[name]}
    folder = run / "checkpoints" / str(saved.step)
    folder.mkdir(parents=True)
    for name in KEPT:
        if (saved.run / name).is_file():
            shutil.copyfile(saved.run / name, run / name)
    for name in saved.manifest.files:
        if (name.startswith(below) or "/" not in name) and array_of(name) not in changed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(saved.folder / name, folder / name)
    for name in sorted(changed):
        convert(saved.folder, name, folder, shapes[name][1])
    write_manifest(folder, shapes, saved.manifest.extra)
    return shapes
