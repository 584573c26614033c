"""Batches made and placed on the devices ahead of the step that takes them."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from grain.experimental import ThreadPrefetchDatasetIterator

from gshardx.data.pipeline import Rows, TrainingRows

T = TypeVar("T")


class Placed(Generic[T]):
    """``rows``, each batch through ``place``, in this thread."""

    def __init__(self, rows: TrainingRows, place: Callable[[Rows], T]) -> None:
        self._rows, self._place = rows, place

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._place(next(self._rows))

    def get_state(self) -> dict[str, int]:
        return self._rows.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        self._rows.set_state(state)


class Ahead(Generic[T]):
    """Up to ``count`` placed batches made in a thread; the state is that of the batch given last, not of the one made
    last. With 0, each is made when asked for."""

    def __init__(self, rows: TrainingRows, place: Callable[[Rows], T], count: int) -> None:
        self._rows = rows
        self._thread = ThreadPrefetchDatasetIterator(Placed(rows, place), count)

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        batch: T = next(self._thread)
        return batch

    def get_state(self) -> dict[str, int]:
        state: dict[str, int] = self._thread.get_state()
        return state

    def set_state(self, state: dict[str, int]) -> None:
        self._thread.set_state(state)

    @property
    def skipped(self) -> int:
        """Broken records met since the start, also in batches that were made and not given."""
        return self._rows.skipped

    def close(self) -> None:
        """End the thread and the worker processes."""
        self._thread.close()
        self._rows.close()
