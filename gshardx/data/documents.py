"""Text from files: .txt, .jsonl, .parquet and .arrayrecord, compressed or not, one document at a time."""

import dataclasses
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gshardx.data.faults import Faults
from gshardx.data.files import SUFFIXES, find_files, kind_of, open_bytes
from gshardx.errors import BadInput

TEXT_PIECE = 64 * 1024
"""A .txt file longer than this many characters is cut at line ends into several documents, so that it can be split."""
_BATCH = 256
"""Records of a Parquet or ArrayRecord file that are read at once."""
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What readers raise for files that can't be opened or decompressed."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        column: the JSONL field or Parquet column that holds the text.
        faults: meets what is broken.
        advance: hears of bytes read, for a progress bar.
    """

    column: str = "text"
    faults: Faults = dataclasses.field(default_factory=Faults)
    advance: Callable[[int], None] = lambda count: None


def read_documents(path: str, column: str, faults: Faults | None = None, where: str = "data.path =") -> list[str]:
    """Every non-empty document below ``path``, files in name order.

    Args:
        path: see :func:`find_files`.
        column: the JSONL field or Parquet column that holds the text.
        faults: meets what is broken; by default the first is raised.
        where: the key that named the path, for errors.

    Raises:
        BadInput: nothing found, nothing in it, or something broken; names the file and the place in it.
    """
    reading = Reading(column, faults or Faults())
    documents = list(documents_in(find_files(path, reading.faults, where), reading))
    if not documents:
        broken = f" ({reading.faults.summary})" if reading.faults.count else ""
        raise BadInput(f"{where} {path}: no text in it; give files with at least one non-empty document{broken}")
    return documents


def documents_in(files: Iterable[Path], reading: Reading) -> Iterator[str]:
    """The non-empty documents of ``files``, one after the other.

    Raises:
        BadInput: as ``reading.faults`` has it.
    """
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet, ".arrayrecord": _array_record}
    for file in files:
        kind = kind_of(file)[0]
        if not kind:
            raise BadInput(f"{file}: unknown kind of file; use {', '.join(SUFFIXES)}")
        try:
            yield from (text for text in readers[kind](file, reading) if text.strip())
        except _DAMAGE as error:
            reading.faults.met(f"{file}: can't be read ({getattr(error, 'strerror', None) or error})", error)


def _text(file: Path, reading: Reading) -> Iterator[str]:
    lines: list[str] = []
    size, broken = 0, ""
    for offset, _, line in _lines(file, reading):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            broken = broken or f"{file}: byte {offset + error.start} is not UTF-8; convert the file to UTF-8"
            lines.append(line.decode(errors="replace"))
        size += len(lines[-1])
        if size >= TEXT_PIECE:
            yield from _unless(broken, "".join(lines), reading.faults)
            lines, size, broken = [], 0, ""
    yield from _unless(broken, "".join(lines), reading.faults)


def _unless(broken: str, text: str, faults: Faults) -> Iterator[str]:
    if broken:
        faults.met(broken)
    else:
        yield text


def _lines(file: Path, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Offset (in the decompressed file), number from 1, and bytes of each line."""
    offset = 0
    with open_bytes(file, reading.advance) as stream:
        try:
            for number, line in enumerate(stream, 1):
                yield offset, number, line
                offset += len(line)
        except _DAMAGE as error:
            raise OSError(f"damaged after byte {offset:,} of its content: {error}") from error


def _jsonl(file: Path, reading: Reading) -> Iterator[str]:
    for offset, number, line in _lines(file, reading):
        if not line.strip():
            continue
        where = f"{file}, line {number} (byte {offset})"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            reading.faults.met(f"{where}: byte {error.start} of the line is not UTF-8", error)
        except json.JSONDecodeError as error:
            reading.faults.met(f"{where}: not JSON ({error.msg} at column {error.colno})", error)
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
            reading.faults.met(f"{where}: JSON that can't be read ({error})", error)
        else:
            yield from _field(record, where, reading)


def _field(record: Any, where: str, reading: Reading) -> Iterator[str]:
    text = record.get(reading.column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        reading.faults.met(f"{where}: no text in field {reading.column!r} (it has: {fields}); set data.column")
    elif _is_broken(text):
        reading.faults.met(f"{where}: half of a surrogate pair; write the character or its pair")
    else:
        yield text


def _is_broken(text: str) -> bool:
    """Whether ``text`` has a surrogate, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _parquet(file: Path, reading: Reading) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column, faults, row = reading.column, reading.faults, 0
    try:
        table = pq.ParquetFile(file)
        if column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            return faults.met(f"{file}: no column {column!r} (it has: {names}); set data.column")
        for batch in table.iter_batches(_BATCH, columns=[column]):
            values = batch.column(0).to_pylist()
            if not all(value is None or isinstance(value, str) for value in values):
                kind = table.schema_arrow.field(column).type
                return faults.met(f"{file}: column {column!r} holds {kind}, not text; set data.column")
            yield from (value for value in values if value)
            row += len(values)
    except (pa.ArrowInvalid, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        return faults.met(f"{file}: not a readable Parquet file after row {row:,} ({reason})", error)
    reading.advance(file.stat().st_size)
    return None


def _array_record(file: Path, reading: Reading) -> Iterator[str]:
    """Records that are UTF-8 text. Shards of tokens are read by gshardx/data/records.py."""
    from gshardx.data.records import INDEX, open_records, read_record

    if (file.parent / INDEX).exists():
        raise BadInput(f"{file}: a shard of tokens, not of text; give the folder {file.parent}")
    reader = open_records(file)
    for number in range(reader.num_records()):
        where = f"{file}, record {number}"
        data = read_record(reader, number, where, reading.faults)
        try:
            yield "" if data is None else data.decode()
        except UnicodeDecodeError as error:
            reading.faults.met(f"{where}: byte {error.start} is not UTF-8", error)
    reading.advance(file.stat().st_size)
