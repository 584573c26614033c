"""What a corpus gives to train on, by number: pieces of documents, or whole rows of documents laid end to end.

Both count next-token pairs: pair ``i`` of a document is its token ``i`` as the input and token ``i + 1`` as the target,
so a document of n tokens has n - 1 pairs, and each belongs to exactly one example.
"""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int, Integer

from gshardx.data.corpora import Corpus, runs
from gshardx.errors import BadInput


class Spans(NamedTuple):
    """Runs of pairs of one document each, in the order of the examples that they belong to."""

    example: Int[np.ndarray, "spans"]
    """Place of its example among those asked for."""
    document: Int[np.ndarray, "spans"]
    start: Int[np.ndarray, "spans"]
    """First pair."""
    size: Int[np.ndarray, "spans"]
    """Pairs."""


class Examples(Protocol):
    """Training examples of one corpus; none has more pairs than a sequence has tokens."""

    pairs: int
    """Of all documents."""

    def __len__(self) -> int: ...

    def spans(self, numbers: Int[np.ndarray, "examples"]) -> Spans:
        """Where the examples of these numbers lie."""


class Pieces:
    """Each document cut into pieces of a sequence's length, the last one shorter."""

    def __init__(self, lengths: Integer[np.ndarray, "documents"], sequence_length: int) -> None:
        self._pairs = _pairs(lengths)
        self._length = sequence_length
        counts = -(-self._pairs // sequence_length)
        self._ends = np.cumsum(counts)
        self._counts = counts
        self.pairs = int(self._pairs.sum())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def spans(self, numbers: Int[np.ndarray, "examples"]) -> Spans:
        document = np.searchsorted(self._ends, numbers, side="right")
        start = (numbers - (self._ends[document] - self._counts[document])) * self._length
        size = np.minimum(self._pairs[document] - start, self._length)
        return Spans(np.arange(len(numbers)), document, start, size)


class Windows:
    """Documents end to end, in the corpus's order, split after every ``sequence_length`` pairs; the last is shorter."""

    def __init__(self, lengths: Integer[np.ndarray, "documents"], sequence_length: int) -> None:
        self._ends = np.cumsum(_pairs(lengths))
        self._length = sequence_length
        self.pairs = int(self._ends[-1])

    def __len__(self) -> int:
        return -(-self.pairs // self._length)

    def spans(self, numbers: Int[np.ndarray, "examples"]) -> Spans:
        low = numbers * self._length
        high = np.minimum(low + self._length, self.pairs)
        first = np.searchsorted(self._ends, low, side="right")
        counts = np.searchsorted(self._ends, high, side="left") - first + 1
        document = runs(first, counts)
        example = np.repeat(np.arange(len(numbers)), counts)
        begin = np.where(document > 0, self._ends[document - 1], 0)
        start = np.maximum(low[example], begin)
        size = np.minimum(high[example], self._ends[document]) - start
        kept = size > 0  # documents that are held out have no pairs
        return Spans(example[kept], document[kept], (start - begin)[kept], size[kept])


def examples_of(
    corpus: Corpus, held_out: Bool[np.ndarray, "documents"], sequence_length: int, packing: str
) -> Examples:
    """The training examples of a corpus: all documents but those held out.

    Raises:
        BadInput: together they do not fill one sequence, or are too many for the shuffle.
    """
    lengths = np.where(held_out, 0, corpus.lengths)
    made = (Windows if packing == "concatenate" else Pieces)(lengths, sequence_length)
    if made.pairs < sequence_length:
        tokens = int(lengths.sum())
        raise BadInput(
            f"data: the training text has {tokens} tokens, less than one sequence of {sequence_length} and its next "
            f"token; give more text or use data.sequence_length = {max(made.pairs, 1)}"
        )
    if len(made) > 1 << 32:
        raise BadInput(
            f"data: {len(made):,} training examples are more than the 2**32 that can be shuffled; use a longer "
            f"data.sequence_length"
        )
    return made


def _pairs(lengths: Integer[np.ndarray, "documents"]) -> Int[np.ndarray, "documents"]:
    return np.maximum(lengths.astype(np.int64) - 1, 0)
