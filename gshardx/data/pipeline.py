"""Token batches: documents cut into sequences, shuffled, packed, batched (Grain)."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from gshardx.errors import BadInput

Rows = dict[str, np.ndarray]
"""``tokens``, ``tokens_segment_ids``, ``tokens_positions``: int32 ``[b, t + 1]``; segment 0 is padding."""


def cut(documents: list[np.ndarray], sequence_length: int, *, fill: bool = True) -> list[np.ndarray]:
    """Pieces of at most ``sequence_length + 1`` tokens.

    Neighbours share one token, the last of one and the first of the next, so that every token but a document's first is
    predicted exactly once.

    Raises:
        BadInput: all documents together do not fill one sequence (unless ``fill`` is False).
    """
    tokens = sum(len(ids) for ids in documents)
    if fill and tokens < sequence_length + 1:
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
    return grain.experimental.FirstFitPackIterDataset(
        pieces, length_struct={"tokens": sequence_length + 1}, num_packing_bins=rows, seed=seed, shuffle_bins=False
    ).batch(rows, drop_remainder=True)


def training_rows(
    pieces: list[np.ndarray], sequence_length: int, rows: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator[Rows]:
    """Endless batches of ``rows`` packed rows: a function of the seed alone, resumable by ``get_state``/``set_state``.

    Each of ``processes`` reads its own share of the pieces.

    Raises:
        BadInput: fewer pieces than processes.
    """
    if len(pieces) < processes:
        raise BadInput(f"data: {len(pieces)} sequences for {processes} processes; give more text or fewer processes")
    dataset = (
        grain.MapDataset.source(_Pieces(pieces))
        .seed(seed)[process::processes]
        .shuffle()
        .repeat()
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    return iter(_packed(dataset, sequence_length, rows, seed))


def evaluation_rows(pieces: list[np.ndarray], sequence_length: int, rows: int) -> Iterator[Rows]:
    """Every piece once, in order, one a row; the last batch is filled with padding."""
    for start in range(0, len(pieces), rows):
        tokens = np.zeros((rows, sequence_length + 1), np.int32)
        segments = np.zeros_like(tokens)
        for row, piece in enumerate(pieces[start : start + rows]):
            tokens[row, : len(piece)] = piece
            segments[row, : len(piece)] = 1
        positions = np.broadcast_to(np.arange(sequence_length + 1, dtype=np.int32), tokens.shape)
        yield {"tokens": tokens, "tokens_segment_ids": segments, "tokens_positions": positions}


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
