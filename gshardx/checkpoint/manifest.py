"""A checksum of every file of a checkpoint, and what arrays it holds.

Orbax restores a flipped bit without a word (30 of 30 tried with 0.12). So each committed step gets a manifest.json with
the CRC-32C of each of its files, written last and atomically: a step without one was never finished. The manifest ends
with its own checksum. Files are guarded against disks, not against people.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c

NAME = "manifest.json"
SCORE = "score"
"""Among ``extra``: how good the step is, the less the better; null: not evaluated."""
_CHUNK = 1 << 20
_AT_ONCE = 8  # files whose checksums are taken side by side

Files = dict[str, list[Any]]
"""Path below the step's folder to [bytes, checksum]."""

Shapes = dict[str, tuple[list[int], str]]
"""Array name, such as ``params/final_norm.scale``, to shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished step consists of.

    Attributes:
        files: all of them.
        arrays: name to (shape, dtype).
        extra: the caller's own facts, JSON.
        checksum: what kind.
    """

    files: Files
    arrays: Shapes
    extra: dict[str, Any]
    checksum: str

    def below(self, *items: str) -> Files:
        """The files of these items, and those of no item."""
        return {name: about for name, about in self.files.items() if "/" not in name or name.split("/")[0] in items}


def write_manifest(folder: Path, arrays: Shapes, extra: dict[str, Any]) -> None:
    """Checksum every file below ``folder`` and put the manifest beside them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NAME:
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc32c(path)]
    body = json.dumps({"files": files, "arrays": arrays, "extra": extra, "checksum": "crc32c"}, sort_keys=True)
    scratch = folder / f".{NAME}.{os.getpid()}"
    with scratch.open("w") as out:
        out.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(folder / NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None if it is missing, damaged or of a later version."""
    try:
        body, digest, end = (folder / NAME).read_bytes().split(b"\n")
    except (OSError, ValueError):
        return None
    if end or hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    content = json.loads(body)
    arrays = {k: (v[0], v[1]) for k, v in content["arrays"].items()}
    checksum = content.get("checksum", "sha256")
    return Manifest(content["files"], arrays, content["extra"], checksum) if checksum in _CHECKSUMS else None


def score_of(folder: Path) -> float | None:
    """Of a finished step, if it was evaluated."""
    manifest = read_manifest(folder)
    return manifest.extra.get(SCORE) if manifest is not None else None


def damage(folder: Path, checksum: str, files: Files) -> str | None:
    """The first of ``files`` that is not as it was, or None if all are.

    Args:
        folder: of the step.
        checksum: the manifest's.
        files: those of a manifest to look at.

    Returns:
        For example ``"params/final_norm.scale is damaged (c/0: 12 of 512 bytes)"``.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # reading lets other threads run
        return next(filter(None, pool.map(partial(_fault, folder, checksum), files, files.values())), None)


def missized(folder: Path, files: Files) -> str | None:
    """As :func:`damage`, by presence and size alone."""
    return next(filter(None, (_wrong_size(folder, name, size) for name, (size, _) in files.items())), None)


def _fault(folder: Path, checksum: str, name: str, about: list[Any]) -> str | None:
    size, digest = about
    if wrong := _wrong_size(folder, name, size):
        return wrong
    if _CHECKSUMS[checksum](folder / name) != digest:
        return f"{array_of(name)} is damaged ({name}: checksum differs)"
    return None


def _wrong_size(folder: Path, name: str, size: int) -> str | None:
    path = folder / name
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        return f"{array_of(name)} is damaged ({name} is missing)"
    if found != size:
        return f"{array_of(name)} is damaged ({name}: {found} of {size} bytes)"
    return None


def array_of(file: str) -> str:
    """The array that a file belongs to: Orbax keeps each in a folder ITEM/NAME."""
    return "/".join(file.split("/")[:2])


def _crc32c(path: Path) -> str:
    crc = 0
    with path.open("rb", buffering=0) as data:
        while chunk := data.read(_CHUNK):
            crc = google_crc32c.extend(crc, chunk)
    return f"{crc:08x}"


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


_CHECKSUMS: dict[str, Callable[[Path], str]] = {"crc32c": _crc32c, "sha256": _sha256}
"""By their names in manifests; one without a name, of gshardx before CRC-32C, has SHA-256."""
