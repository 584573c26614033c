"""Which saved steps stay, and how the others go."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from gshardx.checkpoint.manifest import NAME


def kept(scores: Mapping[int, float | None], last: int, every: int | None = None, best: int = 0) -> set[int]:
    """Which steps stay: the newest ``last``, those that ``every`` divides, and the ``best`` least scores.

    Args:
        scores: of each saved step, None where it was not evaluated; of equal ones the older stays.
    """
    ordered = sorted(scores)
    newest = ordered[max(0, len(ordered) - last) :]
    divided = [step for step in ordered if every and step % every == 0]
    ranked = sorted((score, step) for step, score in scores.items() if score is not None)
    return {*newest, *divided, *(step for _, step in ranked[:best])}


def remove(folder: Path) -> None:
    """A step. Its manifest goes first: what is interrupted is an unfinished step, and no damaged one."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)
