"""Guesses of the next tokens, which the model then checks all at once: speculative decoding that can't change the text.

A guess is kept where it equals the token that is drawn at its place anyway (:mod:`gshardx.infer.sampling`), so a
drafter may be as wrong as it likes. It is one object with three verbs; how many tokens it is asked for is chosen in
:mod:`gshardx.infer.depth`.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Protocol

from gshardx.infer.scheduler import Segment, Sequence


class Drafter(Protocol):
    """Guesses for sequences whose tokens are all known to the host."""

    def available(self, sequence: Sequence, most: int) -> int:
        """How many tokens it could guess, up to ``most``."""
        ...

    def write(self, segments: list[list[Segment]]) -> None:
        """Put the guesses of each segment that has ``drafts`` into ``sequence.tokens``, after the known ones."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...


class PromptLookup:
    """What followed the last tokens when they stood in the sequence before (prompt lookup decoding, in transformers
    ``prompt_lookup_num_tokens``; "ngram" in vLLM). Costs nothing on the device; right where a text repeats itself.

    Args:
        longest, shortest: tokens in a row that must agree; longer ones are believed first.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.lengths = range(longest, shortest - 1, -1)
        self._indices: dict[Sequence, _Index] = {}

    def available(self, sequence: Sequence, most: int) -> int:
        index = self._indices.setdefault(sequence, _Index(self.lengths))
        start = index.find(sequence.tokens[len(index.tokens) : sequence.known].tolist())
        return 0 if start is None else min(most, sequence.known - start)

    def write(self, segments: list[list[Segment]]) -> None:
        for one in (one for each in segments for one in each if one.drafts):
            start, tokens, known = self._indices[one.sequence].start, one.sequence.tokens, one.sequence.known
            assert start is not None
            tokens[known : known + one.drafts] = tokens[start : start + one.drafts]

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)


class _Index:
    """Where each run of tokens was last followed by another token."""

    def __init__(self, lengths: Several[int]) -> None:
        self.lengths = lengths
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.start: int | None = None

    def find(self, new: list[int]) -> int | None:
        """Take in new tokens; return the place after the latest earlier run that equals the last one, longest first."""
        first, tokens = max(len(self.tokens), 1), self.tokens
        tokens += new
        for end in range(first, len(tokens)):
            for length in self.lengths:
                if length <= end:
                    self.after[tuple(tokens[end - length : end])] = end
        runs = (tuple(tokens[-length:]) for length in self.lengths if length <= len(tokens))
        self.start = next((self.after[run] for run in runs if run in self.after), None)
        return self.start


class FewerExperts:
    """The model itself, with fewer experts a token: no second model, and no keys and values but its own, which the
    check then overwrites (self-speculation, as arXiv 2309.08168 does with fewer layers).

    Args:
        draw: draws ``steps`` tokens for each of the segments by the smaller model, and returns them by segment.
    """

    def __init__(self, draw: Callable[[list[list[Segment]], int], list[list[list[int]]]]) -> None:
        self._draw = draw

    def available(self, sequence: Sequence, most: int) -> int:
        return most

    def write(self, segments: list[list[Segment]]) -> None:
        drafted = [[one for one in each if one.drafts] for each in segments]
        steps = max(one.drafts for each in drafted for one in each)
        for each, drawn in zip(drafted, self._draw(drafted, steps), strict=True):
            for one, tokens in zip(each, drawn, strict=True):
                known = one.sequence.known
                one.sequence.tokens[known : known + one.drafts] = tokens[: one.drafts]

    def forget(self, sequence: Sequence) -> None:
        pass
