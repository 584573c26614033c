"""Blocks of a stream that is only read from its beginning on: documents are tokenised as they come."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gshardx.data.blocks import Block, packed, seed_of
from gshardx.data.corpora import MemoryCorpus, hash_of
from gshardx.data.examples import Pieces, Spans, Windows
from gshardx.data.faults import Faults, Policy
from gshardx.data.hub import stream_documents
from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput

DOCUMENTS = 1024
"""Of a block: they are shuffled and packed together."""
HEAD = 4096
"""Documents at the beginning, in which those to evaluate on are looked for, and on which a BPE is trained."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A Hugging Face dataset and how it is read; see :func:`stream_documents` for ``url`` and ``column``."""

    url: str
    column: str
    validation_fraction: float
    on_error: Policy

    def head(self, faults: Faults) -> tuple[list[str], list[str]]:
        """Training and held-out documents among the first.

        Raises:
            BadInput: there is not one of each.
        """
        texts = [text for text in stream_documents(self.url, self.column, faults, 0, HEAD) if text.strip()]
        held_out = [text for text in texts if self.holds_out(text.encode())]
        training = [text for text in texts if not self.holds_out(text.encode())]
        if not training or not held_out:
            raise BadInput(
                f"{self.url}: {len(held_out)} of its first {len(texts)} documents are held out; use another "
                f"data.validation_fraction"
            )
        return training, list(dict.fromkeys(held_out))

    def holds_out(self, text: bytes) -> bool:
        """By a share of all hashes: nobody knows how many documents there are."""
        return hash_of(text) < int(self.validation_fraction * (1 << 64))


class _Open(NamedTuple):
    """An iterator over documents, the block that it comes to next, and what was broken so far."""

    texts: Iterator[str]
    epoch: int
    number: int
    faults: Faults


class StreamBlocks:
    """Blocks of ``DOCUMENTS`` documents, in the stream's own order; within a block they are shuffled.

    Every process reads and tokenises the whole stream, so that all know the rows of all. Block n begins with document
    ``DOCUMENTS * n``, so that a place is found again by counting.
    """

    def __init__(self, stream: Stream, tokenizer: Tokenizer, sequence_length: int, packing: str, seed: int) -> None:
        self._stream, self._tokenizer = stream, tokenizer
        self._length, self._packing, self._seed = sequence_length, packing, seed
        self._open: _Open | None = None

    def __getstate__(self) -> dict[str, object]:
        """A worker opens the stream anew."""
        return {**self.__dict__, "_open": None}

    def block(self, epoch: int, number: int) -> Block | None:
        texts, skipped = self._read(epoch, number)
        if not texts:
            return None
        encoded = [text.encode() for text in texts if text.strip()]
        kept = [text for text in encoded if not self._stream.holds_out(text)]
        corpus = MemoryCorpus(self._tokenizer.encode_documents([text.decode() for text in kept]), kept)
        seed = seed_of(self._seed, epoch, number)
        if not kept:
            nothing = np.zeros(0, np.int64)
            return Block([corpus], 0, nothing, nothing, nothing, nothing, Spans(*[nothing] * 4), skipped)
        examples = (Windows if self._packing == "concatenate" else Pieces)(corpus.lengths, self._length)
        spans = examples.spans(np.random.RandomState(seed).permutation(len(examples)))
        block = packed([corpus], np.zeros(len(spans.size), np.int64), spans, self._packing, self._length, seed)
        return block._replace(skipped=skipped)

    def _read(self, epoch: int, number: int) -> tuple[list[str], int]:
        """A block's documents, and how many were broken. What is asked for in order is read on; else it is sought."""
        first = number * DOCUMENTS
        if self._open is None or (self._open.epoch, self._open.number) != (epoch, number):
            faults = Faults(self._stream.on_error)
            texts = stream_documents(self._stream.url, self._stream.column, faults, first)
            self._open = _Open(texts, epoch, number, faults)
        texts, faults = self._open.texts, self._open.faults
        before = faults.count
        found = [text for _, text in zip(range(DOCUMENTS), texts, strict=False)]
        self._open = self._open._replace(number=number + 1)
        return found, faults.count - before
