"""Which saved steps stay, and how the others go."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from gshardx.checkpoint.manifest import NAME


def kept(steps: Iterable[int], last: int, every: int | None) -> set[int]:
    """The newest ``last`` steps, and those that ``every`` divides."""
    ordered = sorted(steps)
    return set(ordered[len(ordered) - min(last, len(ordered)) :]) | {
        one for one in ordered if every and one % every == 0
    }


def remove(folder: Path) -> None:
    """A step. Its manifest goes first: what is interrupted is an unfinished step, and no damaged one."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
