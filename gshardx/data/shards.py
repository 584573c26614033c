"""Writes one shard of tokens (gshardx/data/records.py)."""

from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gshardx.data.corpora import hash_of
from gshardx.data.encoding import Encoded
from gshardx.data.files import digest_of
from gshardx.data.records import DOCUMENT, RECORD_TOKENS, Shard
from gshardx.errors import BadInput

OPTIONS = "group_size:1,snappy"
"""A record is read alone. Snappy: tokens of 16 bits are dense already, and zstd costs more time than it saves room."""


class ShardWriter:
    """Documents go into FOLDER/NAME.arrayrecord.part until :meth:`finish`.

    Raises:
        BadInput: no room, or a folder that can't be written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._scratch = folder / f"{name}.arrayrecord.part"
        self._documents: list[tuple[int, int, int]] = []
        self._records = 0
        try:
            self._writer = ArrayRecordWriter(str(self._scratch), OPTIONS)
        except RuntimeError as error:
            raise self._failed(error) from error

    def write(self, document: Encoded) -> None:
        ids, text = document.ids, document.text
        try:
            for start in range(0, len(ids), RECORD_TOKENS):
                self._writer.write(ids[start : start + RECORD_TOKENS].tobytes())
                self._records += 1
        except RuntimeError as error:
            raise self._failed(error) from error
        self._documents.append((len(ids), len(text), hash_of(text)))

    def finish(self, read: int) -> Shard:
        """Put the shard in its place; ``read``: documents of the source up to its end."""
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._failed(error) from error
        shard = Shard(
            name=self._name,
            bytes=self._scratch.stat().st_size,
            sha256=digest_of(self._scratch),
            documents=len(self._documents),
            records=self._records,
            tokens=sum(length for length, _, _ in self._documents),
            read=read,
        )
        np.asarray(self._documents, DOCUMENT).tofile(shard.documents_file(self._folder))
        self._scratch.replace(shard.records_file(self._folder))
        return shard

    def _failed(self, error: Exception) -> BadInput:
        reason = "the disk is full" if "No space left" in str(error) else str(error).splitlines()[0][:200]
        return BadInput(f"{self._scratch}: can't be written ({reason}); mend that and run the same command: it goes on")
