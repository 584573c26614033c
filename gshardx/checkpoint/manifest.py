"""A checksum of every file of a checkpoint, and what arrays it holds.

Orbax restores a flipped bit without a word (30 of 30 tried with 0.12). So each committed step gets a manifest.json with
the SHA-256 of each of its files, written last and atomically: a step without one was never finished. The manifest ends
with its own checksum.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_CHUNK = 1 << 20

Shapes = dict[str, tuple[list[int], str]]
"""Array name, such as ``params/final_norm.scale``, to shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished step consists of.

    Attributes:
        files: path below the step's folder to [bytes, SHA-256].
        arrays: name to (shape, dtype).
        extra: the caller's own facts, JSON.
    """

    files: dict[str, list[Any]]
    arrays: Shapes
    extra: dict[str, Any]


def write_manifest(folder: Path, arrays: Shapes, extra: dict[str, Any]) -> None:
    """Checksum every file below ``folder`` and put the manifest beside them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != NAME:
            files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sha256(path)]
    body = json.dumps({"files": files, "arrays": arrays, "extra": extra}, sort_keys=True)
    scratch = folder / f".{NAME}.{os.getpid()}"
    with scratch.open("w") as out:
        out.write(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
        out.flush()
        os.fsync(out.fileno())
    scratch.replace(folder / NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None if it is missing or damaged."""
    try:
        body, digest, end = (folder / NAME).read_bytes().split(b"\n")
    except (OSError, ValueError):
        return None
    if end or hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    content = json.loads(body)
    return Manifest(content["files"], {k: (v[0], v[1]) for k, v in content["arrays"].items()}, content["extra"])


def damage(folder: Path, manifest: Manifest, below: str | tuple[str, ...] = "") -> str | None:
    """The first file of ``manifest`` whose path starts with ``below`` (one of them) that is not as it was, or None if
    all are.

    Returns:
        For example ``"params/final_norm.scale is damaged (c/0: 12 of 512 bytes)"``.
    """
    for name, (size, digest) in manifest.files.items():
        if not name.startswith(below):
            continue
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{array_of(name)} is damaged ({name} is missing)"
        if found != size:
            return f"{array_of(name)} is damaged ({name}: {found} of {size} bytes)"
        if _sha256(path) != digest:
            return f"{array_of(name)} is damaged ({name}: checksum differs)"
    return None


def array_of(file: str) -> str:
    """The array that a file belongs to: Orbax keeps each in a folder ITEM/NAME."""
    return "/".join(file.split("/")[:2])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
