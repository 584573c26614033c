"""Texts to tokens in order, in one process or several."""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from gshardx.data.tokenizer import Tokenizer
from gshardx.data.workers import end_with_parent

_BATCH = 1 << 20
"""Characters of text that a worker is given at once."""
_AHEAD = 4
"""Batches a worker."""
_tokenizer: Tokenizer | None = None  # a worker's own


class Encoded(NamedTuple):
    """A document: its ids between two end tokens, and the UTF-8 that they stand for."""

    ids: Integer[np.ndarray, "tokens"]
    text: bytes


def encoded(texts: Iterable[str], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Every document in order, tokenised by ``workers`` processes; with one, by the library's threads in this one."""
    batches = _batches(texts)
    if workers == 1:
        for batch in batches:
            yield from _joined(batch, tokenizer.encode_documents(batch))
        return
    spawn = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
    with ProcessPoolExecutor(workers, spawn, _start, (tokenizer,)) as pool:
        for batch in batches:
            pending.append((batch, pool.submit(_encode, batch)))
            if len(pending) >= _AHEAD * workers:
                done, ids = pending.popleft()
                yield from _joined(done, ids.result())
        for done, ids in pending:
            yield from _joined(done, ids.result())


def _joined(batch: list[str], ids: list[np.ndarray]) -> Iterator[Encoded]:
    return map(Encoded, ids, (text.encode() for text in batch))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(tokenizer: Tokenizer) -> None:
    global _tokenizer
    end_with_parent()
    _tokenizer = tokenizer


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return _tokenizer.encode_documents(texts)
