"""In which order examples come: shuffled anew each epoch, mixed by weight, endless, known at any place.

Everything here is a function of the seed, the examples and the weights; processes, workers and batches play no part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

WINDOW = 1024
"""Examples that are packed together. More fill rows a little better and cost more to go back to after a resume."""
RESOLUTION = 1 << 20
"""A source's share of a mixture is a multiple of 1 / RESOLUTION."""
_ROUNDS = 4
"""Of the shuffle's cipher, as Grain uses it."""


class Chosen(NamedTuple):
    """Examples by source and number."""

    source: Int[np.ndarray, "examples"]
    number: Int[np.ndarray, "examples"]


class Order:
    """The endless sequence of examples of one or more sources, in blocks of ``WINDOW``.

    With one source an epoch is each of its examples once, and the last block of an epoch is shorter. A mixture has one
    endless epoch: from its beginning on, no source is ever further from its share than as many examples as there are
    sources, and each comes anew shuffled when it has been through.

    Args:
        counts: examples of each source.
        weights: of each source, in examples; any positive numbers.
        seed: 0 to 2**32 - 1.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._counts = counts
        self._proportions = _whole_numbers(weights)
        self._seeds = [int(np.random.SeedSequence((seed, k)).generate_state(1)[0]) for k in range(len(counts))]
        self.seed = seed

    def block(self, epoch: int, number: int) -> Chosen | None:
        """Examples of a block; None past the end of the epoch."""
        first = number * WINDOW
        if len(self._counts) > 1:
            source, index = _shares(np.arange(first, first + WINDOW), self._proportions)
            pairs = zip(source.tolist(), index.tolist(), strict=True)
            return Chosen(source, np.asarray([self._shuffled(k, *divmod(i, self._counts[k])) for k, i in pairs]))
        indices = range(first, min(first + WINDOW, self._counts[0]))
        if not indices:
            return None
        return Chosen(np.zeros(len(indices), np.int64), np.asarray([self._shuffled(0, epoch, i) for i in indices]))

    def _shuffled(self, source: int, epoch: int, index: int) -> int:
        seed = (self._seeds[source] + epoch) % (1 << 32)
        return shuffled(index, self._counts[source], seed)


def shuffled(index: int, count: int, seed: int) -> int:
    """Where ``index`` of ``count`` goes in the shuffle of this seed."""
    return int(index_shuffle(index, max_index=count - 1, seed=seed, rounds=_ROUNDS)) if count > 1 else 0


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    total = sum(weights)
    return [max(1, round(RESOLUTION * weight / total)) for weight in weights]


def _shares(
    places: Int[np.ndarray, "places"], proportions: Sequence[int]
) -> tuple[Int[np.ndarray, "places"], Int[np.ndarray, "places"]]:
    """Which source has each place of an endless mixture, and its how-manieth place that is.

    One source after the other is split off: of the first n places left, it has ceil(n * its share of what is left).
    """
    source = np.full(len(places), -1, np.int64)
    index = np.zeros(len(places), np.int64)
    remaining, low, high = sum(proportions), places.astype(np.int64), places.astype(np.int64) + 1
    for number, share in enumerate(proportions):
        kept_low, kept_high = (n * (remaining - share) // remaining for n in (low, high))
        here = (source < 0) & (high - kept_high > low - kept_low)
        source[here] = number
        index[here] = (low - kept_low)[here]
        remaining, low, high = remaining - share, kept_low, kept_high
        if remaining == 0:
            break
    return source, index


def temperature_weights(tokens: Sequence[int], weights: Sequence[float], temperature: float | None) -> list[float]:
    """Shares of the tokens, which sum to 1: each weight times tokens ** (1 / T), or the weight alone without a T.

    T = 1 follows the sources' sizes, a large T makes them equal; GShard's translation uses T = 5 (arXiv 2006.16668,
    1907.05019).
    """
    raw = [w * (n ** (1 / temperature) if temperature else 1.0) for w, n in zip(weights, tokens, strict=True)]
    return [one / sum(raw) for one in raw]
