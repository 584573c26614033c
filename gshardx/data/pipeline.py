"""Token batches: blocks of packed rows, cut into batches of which each process fills its own rows."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import absl.flags
import grain
import numpy as np
from jaxtyping import Int

from gshardx.data.blocks import Block, Blocks
from gshardx.data.corpora import runs
from gshardx.data.faults import Faults, Policy
from gshardx.data.workers import end_with_parent
from gshardx.errors import BadInput

Rows = dict[str, np.ndarray]
"""Arrays ``[b, t]``: int32 ``tokens``, ``targets`` (the next tokens), ``segments`` (a number a document within the row,
0 for padding) and ``positions`` (place in the document, from where the row has it); float32 ``weights``, 1.0 where the
target counts, else 0.0."""
_INTEGERS = ("tokens", "targets", "segments", "positions")


class Place(NamedTuple):
    """The next row: the state of every iterator over rows, whatever the number of processes and workers."""

    epoch: int = 0
    block: int = 0
    row: int = 0


class RowDataset(grain.IterDataset[dict[str, np.ndarray]]):
    """Endless batches, as Grain wants them for its worker processes.

    Elements are Rows of this process's rows, and beside them ``place``: the Place after the batch and the number of
    broken spans in it.

    Args:
        blocks: all rows of all processes.
        sequence_length: columns.
        batch: rows of a batch, over all processes.
        mine: those of them to fill, ascending.
        on_error: what to do about records that can't be read.
    """

    def __init__(
        self, blocks: Blocks, sequence_length: int, batch: int, mine: Int[np.ndarray, "rows"], on_error: Policy
    ) -> None:
        super().__init__()
        self.blocks, self.sequence_length, self.batch, self.on_error = blocks, sequence_length, batch, on_error
        self.mine = mine
        self.start = Place()
        self.slice = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in a worker: give only every so-manieth batch."""
        self.slice = sl

    def starting(self, place: Place) -> "RowDataset":
        other = copy.copy(self)
        other.start = place
        return other

    def __iter__(self) -> "RowIterator":
        return RowIterator(self)

    def __str__(self) -> str:
        return "RowDataset"


class RowIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    """See :class:`RowDataset`."""

    def __init__(self, dataset: RowDataset) -> None:
        super().__init__()
        self._of = dataset
        self._walk = Walk(dataset.blocks, dataset.start)
        self._walk.skip((dataset.slice.start or 0) * dataset.batch)
        self._local = np.full(dataset.batch, -1)
        self._local[dataset.mine] = np.arange(len(dataset.mine))

    def __next__(self) -> dict[str, np.ndarray]:
        of, faults = self._of, Faults(self._of.on_error)
        rows = empty_rows(len(of.mine), of.sequence_length)
        done = skipped = 0
        for block, first, count in self._walk.take(of.batch):
            skipped += block.skipped if first == 0 else 0
            fill(rows, block, first, self._local[done : done + count], faults)
            done += count
        rows["weights"] = (rows["segments"] > 0).astype(np.float32)
        rows["place"] = np.asarray([*self._walk.place, skipped + faults.count])
        self._walk.skip(((of.slice.step or 1) - 1) * of.batch)
        return rows

    def get_state(self) -> dict[str, Any]:
        return self._walk.place._asdict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._walk = Walk(self._of.blocks, Place(**state))


class Walk:
    """A Place that moves over blocks, and the block where it is."""

    def __init__(self, blocks: Blocks, place: Place) -> None:
        self._blocks, self.place = blocks, place
        self._block: Block | None = None

    def take(self, count: int) -> Iterator[tuple[Block, int, int]]:
        """Pass over the next ``count`` rows: blocks, the first row in each, and how many of it."""
        while count:
            block = self._current()
            here = min(count, block.rows - self.place.row)
            yield block, self.place.row, here
            self.place = self.place._replace(row=self.place.row + here)
            count -= here

    def skip(self, count: int) -> None:
        for _ in self.take(count):
            pass

    def _current(self) -> Block:
        """The block of the next row; it moves to the next block, or the next epoch, where one ends."""
        if self._block is not None and self.place.row >= self._block.rows:
            self.place, self._block = Place(self.place.epoch, self.place.block + 1), None
        if self._block is None:
            self._block = self._blocks.block(self.place.epoch, self.place.block)
        if self._block is None:
            self.place = Place(self.place.epoch + 1)
            self._block = self._blocks.block(*self.place[:2])
        if self._block is None:
            raise BadInput("data: an epoch without a document; is the source empty?")
        if self.place.row >= self._block.rows:
            return self._current()
        return self._block


def empty_rows(count: int, length: int) -> Rows:
    return {name: np.zeros((count, length), np.int32) for name in _INTEGERS}


def fill(rows: Rows, block: Block, first: int, local: Int[np.ndarray, "taken"], faults: Faults) -> None:
    """Write the rows of ``block`` from ``first`` on into those of ``rows`` that ``local`` names, or nowhere at -1."""
    low, high = np.searchsorted(block.row, [first, first + len(local)])
    target = local[block.row[low:high] - first]
    chosen = low + np.flatnonzero(target >= 0)
    corpora = block.corpus[chosen]
    for number in np.unique(corpora).tolist():
        here = chosen[corpora == number]
        size = block.spans.size[here]
        read = block.corpora[number].read(block.spans.document[here], block.spans.start[here], size + 1, faults)
        # A run of tokens is one longer than its pairs: inputs are all but its last, targets all but its first.
        inputs = runs(np.cumsum(size + 1) - (size + 1), size)
        column = block.column[here]
        flat = runs(local[block.row[here] - first] * rows["tokens"].shape[1] + column, size)
        good = np.repeat(~read.broken, size)
        inputs, flat = inputs[good], flat[good]
        rows["tokens"].reshape(-1)[flat] = read.ids[inputs]
        rows["targets"].reshape(-1)[flat] = read.ids[inputs + 1]
        rows["segments"].reshape(-1)[flat] = np.repeat(block.segment[here], size)[good]
        rows["positions"].reshape(-1)[flat] = runs(np.zeros(len(size), np.int64), size)[good]


class TrainingRows:
    """Endless batches of this process's rows, by the seed alone; resumable by ``get_state`` and ``set_state``.

    The state is a :class:`Place`: small integers that mean the same to any number of processes and workers.

    Args:
        dataset: the batches.
        workers: processes that make them; 0: this one.
        ahead: batches that each of them has ready.
    """

    def __init__(self, dataset: RowDataset, workers: int = 0, ahead: int = 1) -> None:
        self._dataset, self._workers, self._ahead = dataset, workers, max(ahead, 1)
        self._rows: grain.DatasetIterator[dict[str, np.ndarray]] | None = None
        self.place = dataset.start
        self.skipped = 0
        """Broken records met since the start."""

    def __iter__(self) -> "TrainingRows":
        return self

    def __next__(self) -> Rows:
        if self._rows is None:
            dataset: grain.IterDataset[dict[str, np.ndarray]] = self._dataset.starting(self.place)
            if self._workers:
                # Grain asks absl for flags of its own, which refuses until somebody has parsed the command line.
                absl.flags.FLAGS.mark_as_parsed()
                options = grain.MultiprocessingOptions(self._workers, self._ahead)
                dataset = dataset.mp_prefetch(options, worker_init_fn=lambda index, count: end_with_parent())
            self._rows = iter(dataset)
        rows = next(self._rows)
        if self._workers:  # out of the shared memory, which must go before the interpreter does
            rows = {name: np.array(array) for name, array in rows.items()}
        *place, skipped = rows.pop("place").tolist()
        self.place = Place(*place)
        self.skipped += skipped
        return rows

    def get_state(self) -> dict[str, int]:
        """Of the batch given last."""
        return self.place._asdict()

    def set_state(self, state: dict[str, int]) -> None:
        """Go on after the batch of which this was the state.

        Raises:
            BadInput: it is none.
        """
        try:
            place = Place(**state)
        except TypeError as error:
            raise BadInput(
                f"data: a position that this version can't read ({', '.join(state)}); start a new run"
            ) from error
        self.close()
        self.place = place

    def close(self) -> None:
        """End the worker processes."""
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()


def training_rows(
    blocks: Blocks,
    sequence_length: int,
    batch: int,
    mine: Sequence[int] | Int[np.ndarray, "rows"] | None = None,
    *,
    on_error: Policy = "fail",
    workers: int = 0,
) -> TrainingRows:
    """Batches of ``batch`` rows, of which this process fills ``mine`` (default: all)."""
    rows = np.arange(batch) if mine is None else np.asarray(mine)
    return TrainingRows(RowDataset(blocks, sequence_length, batch, rows, on_error), workers)


def evaluation_rows(documents: Sequence[np.ndarray], sequence_length: int, rows: int) -> Iterator[Rows]:
    """Batches that score every token of every document, but its first, exactly once.

    Windows of ``sequence_length`` advance by half of it, and each scores only what the one before did not: a token sees
    at least half a sequence of what came before it, where there is as much. The last batch is filled with padding.
    Beside Rows each batch has ``document``, ``[b]``: the number of each row's document, 0 for padding.
    """
    windows = [(number, *window) for number, ids in enumerate(documents) for window in _windows(ids, sequence_length)]
    for start in range(0, len(windows), rows):
        shape = (rows, sequence_length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        weights, document = np.zeros(shape, np.float32), np.zeros(rows, np.int64)
        for row, (number, ids, scored) in enumerate(windows[start : start + rows]):
            length = len(ids) - 1
            batch["tokens"][row, :length] = ids[:-1]
            batch["targets"][row, :length] = ids[1:]
            batch["segments"][row, :length] = 1
            weights[row, scored:length] = 1.0
            document[row] = number
        positions = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), shape)
        yield {**batch, "positions": positions, "weights": weights, "document": document}


def _windows(ids: np.ndarray, sequence_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of at most ``sequence_length + 1`` tokens and how many of their targets have been scored already."""
    start, scored_to = 0, 0  # ids up to scored_to have been scored (the first has no one to predict it)
    while scored_to < len(ids) - 1:
        window = ids[start : start + sequence_length + 1]
        yield window, scored_to - start
        scored_to = start + len(window) - 1
        start += max(sequence_length // 2, 1)
