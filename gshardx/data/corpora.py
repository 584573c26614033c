"""Tokenised documents that can be read at any place."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt64

from gshardx.data.faults import Faults
from gshardx.errors import BadInput


class Tokens(NamedTuple):
    """Runs of tokens, one after the other."""

    ids: Integer[np.ndarray, "total"]
    broken: Bool[np.ndarray, "runs"]
    """Runs that could not be read and were skipped: their ids mean nothing."""


class Corpus(Protocol):
    """Documents by number; they stand between end tokens, as :meth:`Tokenizer.encode_documents` gives them."""

    @property
    def lengths(self) -> Integer[np.ndarray, "documents"]:
        """Tokens of each document."""

    @property
    def hashes(self) -> UInt64[np.ndarray, "documents"]:
        """Of each document's text (:func:`hash_of`)."""

    @property
    def sizes(self) -> Integer[np.ndarray, "documents"]:
        """Bytes of each document's text."""

    @property
    def digest(self) -> str:
        """Equal digests, equal documents in the same order."""

    def read(
        self,
        documents: Int[np.ndarray, "runs"],
        starts: Int[np.ndarray, "runs"],
        counts: Int[np.ndarray, "runs"],
        faults: Faults,
    ) -> Tokens:
        """``counts`` tokens of each of ``documents`` from ``starts`` on, none past its end.

        Raises:
            BadInput: a broken record, unless ``faults`` skips it.
        """


class MemoryCorpus:
    """Documents in memory.

    Args:
        documents: their tokens.
        texts: the UTF-8 that they stand for.
    """

    def __init__(self, documents: Sequence[np.ndarray], texts: Sequence[bytes] = ()) -> None:
        self.lengths = np.asarray([len(ids) for ids in documents], np.int64)
        self.sizes = np.asarray([len(text) for text in texts], np.int64)
        self.hashes = hashes_of(texts)
        self._first = np.cumsum(self.lengths) - self.lengths
        self._ids = np.concatenate([np.zeros(0, np.uint8), *documents])

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self._ids.tobytes())
        return digest.hexdigest()

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray, faults: Faults) -> Tokens:
        return Tokens(self._ids[runs(self._first[documents] + starts, counts)], np.zeros(len(documents), bool))


def runs(firsts: Int[np.ndarray, "runs"], counts: Int[np.ndarray, "runs"]) -> Int[np.ndarray, "total"]:
    """``firsts[i]``, ``firsts[i] + 1``, ... ``counts[i]`` of them, run after run."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)


def whole_document(corpus: Corpus, document: int, faults: Faults) -> np.ndarray | None:
    """int32, or None if it is broken and was skipped."""
    one = np.asarray([document])
    tokens = corpus.read(one, np.zeros(1, np.int64), np.asarray(corpus.lengths[one], np.int64), faults)
    return None if tokens.broken[0] else tokens.ids.astype(np.int32)


def hash_of(text: bytes) -> int:
    """The first 64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def hashes_of(texts: Iterable[bytes]) -> UInt64[np.ndarray, "documents"]:
    return np.asarray([hash_of(text) for text in texts], np.uint64)


def held_out(hashes: UInt64[np.ndarray, "documents"], fraction: float) -> Bool[np.ndarray, "documents"]:
    """Which documents are held out: those with the smallest hashes, so that order and file names play no part.

    Args:
        hashes: :func:`hash_of` each document's text; equal documents are one.
        fraction: share of the different documents; at least one is held out and one is left.

    Raises:
        BadInput: fewer than two different documents.
    """
    different = np.unique(hashes)
    if len(different) < 2:
        raise BadInput("data: one document can't be split into training and held-out text; give at least two")
    count = min(max(1, round(fraction * len(different))), len(different) - 1)
    return hashes <= different[count - 1]


class Chain:
    """Several corpora as one, their documents one after the other."""

    def __init__(self, parts: Sequence[Corpus]) -> None:
        self._parts = parts
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.hashes = np.concatenate([part.hashes for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._ends = np.cumsum([len(part.lengths) for part in parts])
        self.digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()

    def read(self, documents: np.ndarray, starts: np.ndarray, counts: np.ndarray, faults: Faults) -> Tokens:
        part = np.searchsorted(self._ends, documents, side="right")
        ids, broken = np.zeros(int(counts.sum()), np.int32), np.zeros(len(documents), bool)
        before = np.cumsum(counts) - counts
        for number in np.unique(part).tolist():
            here = np.flatnonzero(part == number)
            first = self._ends[number] - len(self._parts[number].lengths)
            read = self._parts[number].read(documents[here] - first, starts[here], counts[here], faults)
            ids[runs(before[here], counts[here])] = read.ids
            broken[here] = read.broken
        return Tokens(ids, broken)
