"""Text from files: .txt, .jsonl and .parquet, one file, a folder or a glob."""

import glob
import hashlib
import json
from importlib import resources
from pathlib import Path

from gshardx.errors import BadInput

PACKAGED = {"shakespeare": "shakespeare.jsonl"}
SUFFIXES = (".txt", ".jsonl", ".parquet")
TEXT_PIECE = 64 * 1024
"""A .txt file longer than this many characters is cut at line ends into several documents, so that it can be split."""


def read_documents(path: str, column: str) -> list[str]:
    """Every non-empty document below ``path``, files in name order.

    Args:
        path: a file, a folder (searched recursively), a glob, or the name of a packaged corpus.
        column: the JSONL field or Parquet column that holds the text.

    Raises:
        BadInput: nothing found, nothing in it, or a file that can't be read; names the file and line.
    """
    documents = [text for file in _files(path) for text in _read(file, column) if text.strip()]
    if not documents:
        raise BadInput(f"data.path = {path}: no text in it; give files with at least one non-empty document")
    return documents


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents. Those with the smallest SHA-256 are held out, so order plays no part.

    Raises:
        BadInput: fewer than two different documents.
    """
    digest = {text: hashlib.sha256(text.encode()).hexdigest() for text in documents}
    if len(digest) < 2:
        raise BadInput("data: one document can't be split into training and held-out text; give at least two")
    count = min(max(1, round(validation_fraction * len(digest))), len(digest) - 1)
    held_out = set(sorted(digest, key=digest.__getitem__)[:count])
    return [d for d in documents if d not in held_out], [d for d in digest if d in held_out]


def _files(path: str) -> list[Path]:
    if path in PACKAGED:
        return [Path(str(resources.files("gshardx.data") / "corpus" / PACKAGED[path]))]
    place = Path(path)
    try:
        if place.is_dir():
            found = [file for file in place.rglob("*") if file.suffix in SUFFIXES]
        elif place.exists():
            found = [place]
        else:
            found = [Path(match) for match in glob.glob(path, recursive=True)]
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise BadInput(f"data.path = {path}: no such file ({error.strerror})") from error
    if not found:
        raise BadInput(f"data.path = {path}: no such file, nor a glob or folder with {', '.join(SUFFIXES)} files in it")
    return sorted(found)


def _read(file: Path, column: str) -> list[str]:
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise BadInput(f"{file}: unknown kind of file; use {', '.join(SUFFIXES)}")
    try:
        return readers[file.suffix](file, column)
    except OSError as error:
        raise BadInput(f"{file}: can't be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def _read_text(file: Path, column: str) -> list[str]:
    with file.open(encoding="utf-8", newline="") as stream:
        text = stream.read()
    pieces, start = [], 0
    while start < len(text):
        cut = text.find("\n", start + TEXT_PIECE - 1) + 1 or len(text)
        pieces.append(text[start:cut])
        start = cut
    return pieces


def _read_jsonl(file: Path, column: str) -> list[str]:
    texts = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise BadInput(f"{file}, line {number}: byte {error.start} of the line is not UTF-8") from error
            except json.JSONDecodeError as error:
                raise BadInput(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
                raise BadInput(f"{file}, line {number}: JSON that can't be read ({error})") from error
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise BadInput(
                    f"{file}, line {number}: no text in field {column!r} (it has: {fields}); set data.column"
                )
            if _is_broken(record[column]):
                raise BadInput(f"{file}, line {number}: half of a surrogate pair; write the character or its pair")
            texts.append(record[column])
    return texts


def _is_broken(text: str) -> bool:
    """Whether ``text`` has a surrogate, which JSON can spell and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_parquet(file: Path, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        if column not in schema.names:
            raise BadInput(f"{file}: no column {column!r} (it has: {', '.join(schema.names)}); set data.column")
        values = pq.read_table(file, columns=[column])[column].to_pylist()
    except pa.ArrowInvalid as error:
        raise BadInput(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    if not all(value is None or isinstance(value, str) for value in values):
        raise BadInput(f"{file}: column {column!r} holds {schema.field(column).type}, not text; set data.column")
    return [value for value in values if value]
