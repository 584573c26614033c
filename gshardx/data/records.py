"""Tokenised corpora on disk: ArrayRecord shards of tokens, tokenizer.json, and index.json, which lists and checks them.

A document's tokens lie in records of at most ``RECORD_TOKENS``, so that a piece of a long one is read without the rest.
``SHARD.documents`` has a row a document: its tokens, the bytes of its text and the hash of its text.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from gshardx.data.corpora import Tokens, runs
from gshardx.data.faults import Faults
from gshardx.errors import BadInput

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
FORMAT = "gshardx tokens 1"
RECORD_TOKENS = 4096
"""Tokens of a record, but for the last of a document: one page to read for a short piece, few reads for a long one."""
DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("hash", "<u8")])
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_PAGE = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Shard:
    """What index.json says of one."""

    name: str
    """Of NAME.arrayrecord and NAME.documents."""
    bytes: int
    """Of the .arrayrecord file."""
    sha256: str
    documents: int
    records: int
    tokens: int
    read: int
    """Documents of the source that had been read when it was full."""

    def records_file(self, folder: Path) -> Path:
        return folder / f"{self.name}.arrayrecord"

    def documents_file(self, folder: Path) -> Path:
        return folder / f"{self.name}.documents"


class RecordCorpus:
    """A folder that ``python -m gshardx.data tokenize`` wrote. Only lengths, sizes and hashes are in memory.

    Args:
        folder: the folder.
        faults: meets shards that are missing or shorter than the index says; without one, their documents are left out.

    Raises:
        BadInput: no index, or one that can't be read, or a fault.
    """

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder = folder
        index = read_index(folder)
        self._shards = [shard for shard in _shards(index, folder) if _whole(shard, folder, faults)]
        if not self._shards:
            raise BadInput(f"{folder}: no shard is left of the {len(index['shards'])} that {INDEX} lists")
        documents = np.concatenate([_documents(shard, folder) for shard in self._shards])
        self.lengths, self.sizes, self.hashes = documents["tokens"], documents["bytes"], documents["hash"]
        self._dtype, self._record = np.dtype(index["dtype"]), int(index["record_tokens"])
        # A record never spans documents: this counts them over all shards.
        records = -(-self.lengths.astype(np.int64) // self._record)
        self._first = np.cumsum(records) - records
        self._ends = np.cumsum([shard.records for shard in self._shards])
        kept = [shard.sha256 for shard in self._shards]
        self.digest = hashlib.sha256(json.dumps([index["tokenizer"], kept]).encode()).hexdigest()
        self._readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Readers are opened anew where it is unpickled: in a worker."""
        return {**self.__dict__, "_readers": {}}

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray, faults: Faults) -> Tokens:
        first = starts // self._record
        per_run = (starts + counts - 1) // self._record - first + 1
        numbers = runs(self._first[documents] + first, per_run)
        parts = self._records(numbers, faults)
        broken = np.zeros(len(documents), bool)
        run = np.repeat(np.arange(len(documents)), per_run)
        for place in [i for i, part in enumerate(parts) if part is None]:
            broken[run[place]] = True
        ends = np.cumsum(per_run).tolist()
        pieces = []
        for i, (end, many, skip, count) in enumerate(
            zip(ends, per_run.tolist(), (starts - first * self._record).tolist(), counts.tolist(), strict=True)
        ):
            if broken[i]:
                pieces.append(np.zeros(count, self._dtype))
            elif many == 1:
                pieces.append(parts[end - 1][skip : skip + count])
            else:
                pieces.append(np.concatenate(parts[end - many : end])[skip : skip + count])
        return Tokens(np.concatenate(pieces), broken)

    def _records(self, numbers: Int[np.ndarray, "records"], faults: Faults) -> list[Any]:
        """Tokens of each record, or None."""
        found: list[Any] = [None] * len(numbers)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            within = numbers[places] - (self._ends[shard] - self._shards[shard].records)
            for place, data in zip(places.tolist(), self._read(shard, within.tolist(), faults), strict=True):
                found[place] = None if data is None else np.frombuffer(data, self._dtype)
        return found

    def _read(self, shard: int, numbers: list[int], faults: Faults) -> list[bytes | None]:
        file = self._shards[shard].records_file(self.folder)
        try:
            if shard not in self._readers:
                self._readers[shard] = open_records(file)
        except OSError as error:  # it was whole when the run started
            faults.met(f"{file}: can't be read ({error}); restore it", error)
            return [None] * len(numbers)
        reader = self._readers[shard]
        try:
            found: list[bytes | None] = reader.read(numbers)
        except (RuntimeError, IndexError):
            found = [read_record(reader, number, f"{file}, record {number}", faults) for number in numbers]
        return found


def open_records(file: Path) -> Any:
    """A reader for random access.

    Raises:
        OSError: it is missing, damaged, or no ArrayRecord file.
    """
    reader = ArrayRecordReader(str(file), _RANDOM_ACCESS, file_reader_buffer_size=_PAGE)
    try:
        if not reader.ok():
            reader.read([0])  # says why
    except (RuntimeError, IndexError) as error:
        raise OSError(f"not a readable ArrayRecord file: {_reason(error)}") from error
    return reader


def read_record(reader: Any, number: int, where: str, faults: Faults) -> bytes | None:
    """One record; None if ``faults`` skips it."""
    try:
        data: bytes = reader.read([number])[0]
    except (RuntimeError, IndexError) as error:
        faults.met(f"{where}: {_reason(error)}; restore the file", error)
        return None
    return data


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json holds.

    Raises:
        BadInput: it can't be read, or is of another version.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        known = index["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / INDEX}: can't be read ({error}); run the same tokenize command again") from error
    if known != FORMAT:
        raise BadInput(f"{folder / INDEX}: {known!r} is not {FORMAT!r}; tokenize the text again")
    return index


def is_tokenized(path: str) -> bool:
    """Whether ``path`` is a folder that the tokenize command wrote, or began.

    Raises:
        BadInput: it was begun and not finished.
    """
    folder = Path(path)
    try:
        if (folder / INDEX).exists():
            return True
        begun = (folder / "plan.json").exists()
    except OSError:  # too long a name
        return False
    if begun:
        raise BadInput(f"{folder}: tokenizing it was not finished; run the same tokenize command again")
    return False


def _shards(index: dict[str, Any], folder: Path) -> list[Shard]:
    try:
        return [Shard(**shard) for shard in index["shards"]]
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / INDEX}: damaged ({error}); tokenize the text again") from error


def _whole(shard: Shard, folder: Path, faults: Faults) -> bool:
    """Whether both files of a shard are there, as long as they were, and can be opened."""
    wanted = {
        shard.records_file(folder): shard.bytes,
        shard.documents_file(folder): documents_bytes(shard.documents),
    }
    for file, size in wanted.items():
        try:
            found = file.stat().st_size
        except OSError as error:
            faults.met(f"{file}: missing, and {INDEX} lists it with {shard.documents:,} documents; restore it", error)
            return False
        if found != size:
            faults.met(f"{file}: has {found:,} bytes and {INDEX} says {size:,}: it has changed; restore it")
            return False
    return _opens(shard.records_file(folder), shard.records, faults)


def _opens(file: Path, records: int, faults: Faults) -> bool:
    """Whether a shard's own index, at its end, is whole."""
    try:
        found = open_records(file).num_records()
    except OSError as error:
        faults.met(f"{file}: can't be read ({error}); restore it", error)
        return False
    if found != records:
        faults.met(f"{file}: has {found:,} records and {INDEX} says {records:,}; restore it")
    return bool(found == records)


def _documents(shard: Shard, folder: Path) -> np.ndarray:
    file = shard.documents_file(folder)
    return np.fromfile(file, DOCUMENT)


def documents_bytes(count: int) -> int:
    return count * DOCUMENT.itemsize


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
