"""What a command line means by a checkpoint."""

import dataclasses
from pathlib import Path

from gshardx.checkpoint.manifest import NAME, Manifest, read_manifest
from gshardx.checkpoint.store import finished_steps
from gshardx.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Saved:
    """A finished step."""

    run: Path
    step: int
    manifest: Manifest

    @property
    def folder(self) -> Path:
        return self.run / "checkpoints" / str(self.step)


def checkpoints_of(run: Path) -> Path:
    """Raises:
    BadInput: there are none.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise BadInput(f"{run}: no checkpoints there; give a directory that gshardx.train has written")
    return folder


def find(path: Path, step: int | None) -> Saved:
    """The step of a run, its newest finished one by default; ``path`` may also be RUN_DIR/checkpoints/STEP itself.

    Raises:
        BadInput: there is no such step, or it was never finished.
    """
    if path.parent.name == "checkpoints" and path.name.isdecimal() and step is None:
        path, step = path.parent.parent, int(path.name)
    folder = checkpoints_of(path)
    finished = finished_steps(folder)
    if step is None:
        if not finished:
            raise BadInput(f"{folder}: no finished step in it")
        step = finished[-1]
    manifest = read_manifest(folder / str(step))
    if manifest is None:
        known = ", ".join(map(str, finished)) or "none"
        why = f"{NAME} is missing or damaged" if (folder / str(step)).is_dir() else "no such step"
        raise BadInput(f"{folder / str(step)}: {why}; finished: {known}")
    return Saved(path, step, manifest)
