"""Blocks of packed rows: which documents' tokens stand where, known from lengths alone, before any token is read."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from gshardx.data.corpora import Corpus
from gshardx.data.examples import Examples, Spans, examples_of
from gshardx.data.order import WINDOW, Chosen, Order
from gshardx.data.packing import best_fit, first_fit


class Block(NamedTuple):
    """Rows ready to be filled. Spans are sorted by row, and by place within it."""

    corpora: Sequence[Corpus]
    rows: int
    row: Int[np.ndarray, "spans"]
    column: Int[np.ndarray, "spans"]
    segment: Int[np.ndarray, "spans"]
    """1, 2, 3 ... within the row."""
    corpus: Int[np.ndarray, "spans"]
    spans: Spans
    skipped: int = 0
    """Broken documents that were left out of it."""


class Blocks(Protocol):
    """An endless sequence of blocks, epoch after epoch."""

    def block(self, epoch: int, number: int) -> Block | None:
        """None past the end of the epoch."""


class Mixture:
    """Blocks of sources that can be read at any place.

    Args:
        corpora: the sources.
        held_out: documents of each that are not trained on.
        shares: of the training tokens, one a source; they sum to 1.
        sequence_length: pairs in a row.
        packing: "first_fit", "best_fit" or "concatenate".
        seed: of the order.

    Raises:
        BadInput: a source has too few tokens, or too many.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        held_out: Sequence[Bool[np.ndarray, "documents"]],
        shares: Sequence[float],
        sequence_length: int,
        packing: str,
        seed: int,
    ) -> None:
        self._corpora, self._length, self._packing, self._seed = corpora, sequence_length, packing, seed
        self._examples: list[Examples] = [
            examples_of(corpus, out, sequence_length, packing) for corpus, out in zip(corpora, held_out, strict=True)
        ]
        # Shares are of tokens, and a source of short documents has fewer in an example.
        weights = [share * len(one) / one.pairs for share, one in zip(shares, self._examples, strict=True)]
        self._order = Order([len(one) for one in self._examples], weights, seed)

    def block(self, epoch: int, number: int) -> Block | None:
        chosen = self._order.block(epoch, number)
        if chosen is None:
            return None
        corpus, spans = self._located(chosen)
        return packed(self._corpora, corpus, spans, self._packing, self._length, seed_of(self._seed, epoch, number))

    def _located(self, chosen: Chosen) -> tuple[np.ndarray, Spans]:
        found, sources = [], []
        for source in np.unique(chosen.source).tolist():
            places = np.flatnonzero(chosen.source == source)
            spans = self._examples[source].spans(chosen.number[places])
            found.append(spans._replace(example=places[spans.example]))
            sources.append(np.full(len(spans.size), source))
        together = Spans(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
        order = np.argsort(together.example, kind="stable")
        return np.concatenate(sources)[order], Spans(*(array[order] for array in together))


def packed(
    corpora: Sequence[Corpus], corpus: Int[np.ndarray, "spans"], spans: Spans, packing: str, length: int, seed: int
) -> Block:
    """A block of ``spans``, which lie in ``corpus``; its rows are shuffled, since packing fills them unevenly."""
    if packing == "concatenate":  # an example is a row
        row, rows = spans.example, int(spans.example[-1]) + 1
    else:
        row, rows = (best_fit if packing == "best_fit" else first_fit)(spans.size, length)
    # NumPy keeps RandomState's numbers the same from version to version, and no other generator's.
    place = np.random.RandomState(seed).permutation(rows)
    order = np.argsort(place[row], kind="stable")
    row, spans = place[row][order], Spans(*(array[order] for array in spans))
    counts = np.bincount(row, minlength=rows)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # span that begins each span's row
    before = np.cumsum(spans.size) - spans.size
    return Block(corpora, rows, row, before - before[first], np.arange(len(row)) - first + 1, corpus[order], spans)


def seed_of(seed: int, epoch: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, number, WINDOW)).generate_state(1)[0])
