"""Which files a source names, what kind they are, and how their bytes are opened."""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import re
from collections import defaultdict
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import IO, Any, cast

from gshardx.data.faults import Faults
from gshardx.errors import BadInput

PACKAGED = {"shakespeare": "shakespeare.jsonl"}
SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrayrecord")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Of .txt and .jsonl; the other kinds compress by themselves."""
_SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d+)-of-(?P<total>\d+)(?P<after>.*)")


def find_files(path: str, faults: Faults | None = None, where: str = "data.path =") -> list[Path]:
    """The files of a source, in name order.

    Args:
        path: a file, a folder (searched recursively), a glob, or the name of a packaged corpus.
        faults: meets shards that are missing from a folder (``NAME-00003-of-00008.jsonl``).
        where: the key that named it, for errors.

    Raises:
        BadInput: nothing found.
    """
    if path in PACKAGED:
        return [Path(str(resources.files("gshardx.data") / "corpus" / PACKAGED[path]))]
    place = Path(path)
    try:
        if place.is_dir():
            found = [file for file in place.rglob("*") if kind_of(file)[0]]
            _check_shards(found, faults or Faults())
        elif place.exists():
            found = [place]
        else:
            found = [Path(match) for match in glob.glob(path, recursive=True)]
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise BadInput(f"{where} {path}: no such file ({error.strerror})") from error
    if not found:
        raise BadInput(
            f"{where} {path}: no such file, nor a glob or folder with {', '.join(SUFFIXES)} files in it (also "
            f"{', '.join(COMPRESSED)} of text)"
        )
    return sorted(found)


def kind_of(file: Path) -> tuple[str, str]:
    """The suffix that says what is in it, and that of its compression; "" where there is none that is known."""
    compression = file.suffix if file.suffix in COMPRESSED else ""
    kind = Path(file.stem).suffix if compression else file.suffix
    if kind not in SUFFIXES or (compression and kind not in (".txt", ".jsonl")):
        return "", ""
    return kind, compression


def open_bytes(file: Path, advance: Callable[[int], None]) -> IO[bytes]:
    """The file's bytes, decompressed as its name says; ``advance`` hears of each read from the disk."""
    raw = cast(IO[bytes], io.BufferedReader(_Counted(file, advance), 1 << 20))
    compression = kind_of(file)[1]
    if compression == ".zst":
        import pyarrow as pa

        return cast(IO[bytes], io.BufferedReader(_Readable(pa.CompressedInputStream(raw, "zstd"))))
    openers: dict[str, Callable[[IO[bytes]], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(IO[bytes], openers[compression](raw)) if compression else raw


def digest_of(file: Path) -> str:
    """SHA-256.

    Raises:
        BadInput: it can't be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{file}: can't be read ({error.strerror})") from error


class _Counted(io.FileIO):
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: Path, advance: Callable[[int], None]) -> None:
        super().__init__(file, "rb")
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._advance(count)
        return count


class _Readable(io.RawIOBase):
    """Arrow's stream as Python's, so that it can be read by lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _check_shards(files: list[Path], faults: Faults) -> None:
    """Names that count their shards must all be there."""
    families: dict[tuple[Path, str, int, str], set[int]] = defaultdict(set)
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match:
            family = (file.parent, match["before"], int(match["total"]), match["after"])
            families[family].add(int(match["number"]))
    for (folder, before, total, after), numbers in sorted(families.items()):
        missing = sorted(set(range(total)) - numbers)
        if missing and max(numbers) < total:
            named = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            faults.met(
                f"{folder}: {len(missing)} of {total} shards of {before}*-of-*{after} are missing (number {named}); "
                f"restore them"
            )
