"""Reading the next while the last is written."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R")


def read_ahead(
    wanted: Iterable[K], read: Callable[[K], V], make: Callable[[K, V], R], size: Callable[[K], int], most: int
) -> Generator[R, None, None]:
    """What ``make`` makes of what ``read`` reads, in order; other threads are at the next ones meanwhile.

    Args:
        wanted: what to read.
        read: called by one other thread, in order: it waits for disks.
        make: by yet another: it computes.
        size: bytes that both take for one.
        most: of all together that are being read or made, or wait, or are in use; one alone may be more.
    """
    waiting, held = deque[tuple[int, Future[R]]](), 0
    reader, maker = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("read-ahead", "make-ahead"))
    try:
        for one in wanted:
            while waiting and held + size(one) > most:
                taken, future = waiting.popleft()
                yield future.result()
                held -= taken
            reading = reader.submit(read, one)
            waiting.append((size(one), maker.submit(_made, make, one, reading)))
            held += size(one)
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        for pool in (maker, reader):
            pool.shutdown(cancel_futures=True)


def _made(make: Callable[[K, V], R], one: K, reading: Future[V]) -> R:
    return make(one, reading.result())
