"""How many tokens to guess: as many as pay, by what was accepted so far and what calls cost here; often none.

A fixed depth loses on MoE models, where checking several tokens reads more experts than one token needs (15 % in vLLM's
RFC 46295, 25 to 45 % in mlx-lm's issue 1132). So the rate of tokens is predicted for each depth, none among them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gshardx.infer.scheduler import Sequence

FORGOTTEN = 0.9
"""Weight that a sequence's record of guesses keeps for each new one: about the last ten count."""
PRIOR, PRIOR_WEIGHT = 0.5, 1.0
"""Chance of a guess in a sequence without a record."""
EXPLORE = 32
"""Calls without guesses after which one is tried again, as a text may have begun to repeat itself."""


@dataclasses.dataclass
class _Record:
    right: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    @property
    def chance(self) -> float:
        return self.right / self.tried


class Costs(NamedTuple):
    """Seconds on this machine, as measured when the engine started.

    plain: for one token of each of so many rows. check: for one call over so many tokens. draft: for one guess for each
    of so many rows.
    """

    plain: Callable[[int], float]
    check: Callable[[int], float]
    draft: Callable[[int], float]


def expected_tokens(chance: float, depth: int) -> float:
    """Of one check of ``depth`` guesses, each right with ``chance`` if those before it were: the right ones and the
    token after them (arXiv 2211.17192, equation 1)."""
    return depth + 1.0 if chance >= 1 else (1 - chance ** (depth + 1)) / (1 - chance)


class Depth:
    """Args:

    most: guesses at most.
    costs: see there.
    """

    def __init__(self, most: int, costs: Costs) -> None:
        self.most, self.costs = most, costs
        self._records: dict[Sequence, _Record] = {}
        self._without = 0

    def choose(self, available: Mapping[Sequence, int], rows: int) -> dict[Sequence, int]:
        """Guesses for each sequence, where that is expected to give more tokens a second than none.

        Args:
            available: what could be guessed for each, of ``rows`` that a call computes.
        """
        chances = {sequence: self._records.setdefault(sequence, _Record()).chance for sequence in available}

        def rate(depth: int) -> float:
            if depth == 0:
                return rows / self.costs.plain(rows)
            depths = {sequence: min(depth, count) for sequence, count in available.items()}
            tokens = rows - len(depths) + sum(expected_tokens(chances[one], d) for one, d in depths.items())
            seconds = self.costs.check(rows + sum(depths.values())) + depth * self.costs.draft(len(depths))
            return tokens / seconds

        best = max(range(self.most + 1), key=rate) if available else 0
        self._without = 0 if best else self._without + 1
        if available and self._without >= EXPLORE:
            best, self._without = 1, 0
        return {sequence: min(best, count) for sequence, count in available.items()} if best else {}

    def learn(self, sequence: Sequence, right: int, drafts: int) -> None:
        """Of ``drafts`` guesses the first ``right`` were; the one after them was not, and tells nothing of the rest."""
        record = self._records.setdefault(sequence, _Record())
        for hit in [1.0] * right + [0.0] * (right < drafts):
            record.right = FORGOTTEN * record.right + hit
            record.tried = FORGOTTEN * record.tried + 1

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self._records.pop(sequence, None)
