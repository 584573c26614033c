"""Arrays of a step whose checksums are taken as they are read, so that each file comes from the disk once."""

from math import prod
from pathlib import PurePosixPath

import numpy as np

from gshardx.checkpoint.arrays import get
from gshardx.checkpoint.manifest import Files, damage
from gshardx.checkpoint.places import Saved
from gshardx.errors import BadInput


class Checked:
    """Of some items of a step. What describes its arrays is checked at once.

    Raises:
        BadInput: a file is not as it was saved.
    """

    def __init__(self, saved: Saved, *items: str) -> None:
        self._saved = saved
        self._unchecked: dict[str, Files] = {}
        described: Files = {}
        for file, about in saved.manifest.below(*items).items():
            if _place(file) is None:
                described[file] = about
            else:
                self._unchecked.setdefault("/".join(file.split("/")[:2]), {})[file] = about
        self._check(described)

    def get(self, array: str, at: tuple[int, ...]) -> np.ndarray:
        """What the array has at an index of its first dimensions; the files that it needs are checked first, or all of
        its array's, where one file has several indices.

        Raises:
            BadInput: one is not as it was saved.
        """
        files = self._unchecked.get(array, {})
        if self._one_file_an_index(array, len(at)):
            files = {file: about for file, about in files.items() if (_place(file) or ())[: len(at)] == at}
        self._check(files)
        for file in list(files):
            del self._unchecked[array][file]
        return get(self._saved.folder, array, at)

    def _one_file_an_index(self, array: str, rank: int) -> bool:
        shape = self._saved.manifest.arrays[array][0]
        files = [file for file in self._saved.manifest.files if file.startswith(f"{array}/")]
        places = {place[:rank] for place in map(_place, files) if place is not None}
        return len(places) == prod(shape[:rank])

    def _check(self, files: Files) -> None:
        if bad := damage(self._saved.folder, self._saved.manifest.checksum, files):
            raise BadInput(f"{self._saved.folder}: {bad}; choose another --step")


def _place(file: str) -> tuple[int, ...] | None:
    """Of a chunk among its array's, ITEM/ARRAY/c/0/1; None: it describes something."""
    parts = PurePosixPath(file).parts[2:]
    return tuple(map(int, parts[1:])) if parts[:1] == ("c",) else None
