"""Token batches: documents cut into sequences, shuffled, packed, batched (Grain)."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from gshardx.errors import BadInput

Rows = dict[str, np.ndarray]
"""Arrays ``[b, t]``: int32 ``tokens``, ``targets`` (the next tokens), ``segments`` (a number a document within the row,
0 for padding) and ``positions`` (place in the document); float32 ``weights``, 1.0 where the target counts, else 0.0."""


def cut(documents: list[np.ndarray], sequence_length: int) -> list[np.ndarray]:
    """Pieces of at most ``sequence_length + 1`` tokens.

    Neighbours share one token, the last of one and the first of the next, so that every token but a document's first is
    predicted exactly once.

    Raises:
        BadInput: all documents together do not fill one sequence.
    """
    tokens = sum(len(ids) for ids in documents)
    if tokens < sequence_length + 1:
        raise BadInput(
            f"data: the training text has {tokens} tokens, less than one sequence of {sequence_length} and its next "
            f"token; give more text or use data.sequence_length = {max(tokens - 1, 1)}"
        )
    return [
        ids[start : start + sequence_length + 1]
        for ids in documents
        for start in range(0, len(ids) - 1, sequence_length)
    ]


def _packed(pieces: grain.IterDataset, sequence_length: int, rows: int, seed: int) -> grain.IterDataset:
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces, length_struct={"tokens": sequence_length + 1}, num_packing_bins=rows, seed=seed, shuffle_bins=False
    )
    return packed.batch(rows, drop_remainder=True).map(_with_targets)


def _with_targets(packed: dict[str, np.ndarray]) -> Rows:
    """Each token's target is its right neighbour, and counts if that belongs to the same document."""
    tokens, segments = packed["tokens"], packed["tokens_segment_ids"]
    here, after = segments[:, :-1], segments[:, 1:]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": here,
        "positions": packed["tokens_positions"][:, :-1],
        "weights": ((here == after) & (here > 0)).astype(np.float32),
    }


def training_rows(pieces: list[np.ndarray], sequence_length: int, rows: int, seed: int) -> grain.DatasetIterator[Rows]:
    """Endless batches of ``rows`` packed rows, by the seed alone; resumable by ``get_state``/``set_state``."""
    dataset = (
        grain.MapDataset.source(_Pieces(pieces))
        .seed(seed)
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    return iter(_packed(dataset, sequence_length, rows, seed))


def evaluation_rows(documents: list[np.ndarray], sequence_length: int, rows: int) -> Iterator[Rows]:
    """Batches that score every token of every document, but its first, exactly once.

    Windows of ``sequence_length`` advance by half of it, and each scores only what the one before did not: a token sees
    at least half a sequence of what came before it, where there is as much. The last batch is filled with padding.
    """
    windows = [window for ids in documents for window in _windows(ids, sequence_length)]
    for start in range(0, len(windows), rows):
        shape = (rows, sequence_length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        weights = np.zeros(shape, np.float32)
        for row, (ids, scored) in enumerate(windows[start : start + rows]):
            length = len(ids) - 1
            batch["tokens"][row, :length] = ids[:-1]
            batch["targets"][row, :length] = ids[1:]
            batch["segments"][row, :length] = 1
            weights[row, scored:length] = 1.0
        positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), shape)
        yield {**batch, "positions": positions, "weights": weights}


def _windows(ids: np.ndarray, sequence_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of at most ``sequence_length + 1`` tokens and how many of their targets have been scored already."""
    start, scored_to = 0, 0  # ids up to scored_to have been scored (the first has no one to predict it)
    while scored_to < len(ids) - 1:
        window = ids[start : start + sequence_length + 1]
        yield window, scored_to - start
        scored_to = start + len(window) - 1
        start += max(sequence_length // 2, 1)


class _Pieces:
    """Random access over pieces, as Grain wants it."""

    def __init__(self, pieces: list[np.ndarray]) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.pieces[index]}

    def __repr__(self) -> str:
        return f"{len(self.pieces)} pieces"
