"""What a command line means by a checkpoint."""

import dataclasses
import os
from pathlib import Path

from gshardx.checkpoint.manifest import NAME, Manifest, read_manifest
from gshardx.checkpoint.store import finished_steps, step_folders
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

    @property
    def items(self) -> list[str]:
        """Those with arrays, sorted."""
        return sorted({name.split("/")[0] for name in self.manifest.arrays})


def checkpoints_of(run: Path) -> Path:
    """Raises:
    BadInput: there are none.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise BadInput(f"{run}: no checkpoints there; give a directory that gshardx.train has written")
    return folder


def parse_place(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The run and the step, if one was named: by ``step``, or by ``path`` where it is RUN_DIR/checkpoints/STEP, as seen
    from any directory."""
    whole = Path(os.path.abspath(path))
    is_step = whole.parent.name == "checkpoints" and whole.name.isdecimal() and not (path / "checkpoints").is_dir()
    if step is None and is_step:
        return whole.parent.parent, int(whole.name)
    return path, step


def find(path: Path, step: int | None) -> Saved:
    """The step of a run, its newest finished one by default; ``path`` may also be RUN_DIR/checkpoints/STEP itself.

    Raises:
        BadInput: there is no such step, or it was never finished.
    """
    run, step = parse_place(path, step)
    folder = checkpoints_of(run)
    if step is None:
        finished = finished_steps(folder)
        if not finished:
            raise BadInput(f"{folder}: no finished step in it")
        step = finished[-1]
    manifest = read_manifest(folder / str(step))
    if manifest is None:
        known = ", ".join(map(str, finished_steps(folder))) or "none"
        raise BadInput(f"{folder / str(step)}: {why_unread(folder / str(step))}; finished: {known}")
    return Saved(run, step, manifest)


def folders(path: Path, step: int | None) -> list[Path]:
    """Of all steps of a run, finished or not; only of one where one is named, as for :func:`find`.

    Raises:
        BadInput: there is none.
    """
    run, step = parse_place(path, step)
    folder = checkpoints_of(run)
    steps = step_folders(folder)
    if not steps or step not in (None, *steps):
        known = ", ".join(map(str, steps)) or "none"
        raise BadInput(f"{folder / str(step or '')}: no such step; there: {known}")
    return [folder / str(one) for one in steps if step in (None, one)]


def why_unread(folder: Path) -> str:
    """What is wrong with a step that has no good manifest."""
    if not folder.is_dir():
        return "no such step"
    return f"{NAME} is damaged" if (folder / NAME).exists() else "never finished"
