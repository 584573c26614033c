"""One continuation on its way: what it takes in of each call's results, and what it says of them."""

import dataclasses

import numpy as np

from gshardx.infer.grammar import Constraint
from gshardx.infer.request import FinishReason, Logprob, Output, Request
from gshardx.infer.scheduler import Segment, Sequence
from gshardx.infer.text import TextStream


@dataclasses.dataclass(eq=False)
class Live:
    """cached: tokens of the prompt that the prefix cache had, -1 before the first call. ends: tokens that end it.
    constraint: what its tokens must obey, if anything; allowed: what it says of the next one."""

    request: Request
    choice: int
    sequence: Sequence
    text: TextStream
    ends: frozenset[int]
    constraint: Constraint | None = None
    cached: int = -1

    def __post_init__(self) -> None:
        self.allowed = None if self.constraint is None else self.constraint.mask()

    def output(self) -> Output:
        """Nothing new yet."""
        return Output(self.request.id, self.choice, (), "", (), None, cached_tokens=max(self.cached, 0))

    def take_in(self, segment: Segment, found: dict[str, np.ndarray], count: int) -> tuple[Output, int]:
        """What up to ``count`` places say, those of the prompt first, and how many of the segment's guesses were right.

        Each token after a guess means something only where the guess is the token drawn there.

        Raises:
            FloatingPointError: the model's scores were not finite.
        """
        sequence, params = self.sequence, self.request.params
        prompt = tuple(_logprob(found, number, params.prompt_logprobs or 0) for number in range(segment.scored))
        drawn = min(count - segment.scored, len(sequence.tokens) - sequence.known) if segment.draws else 0
        tokens: list[int] = []
        logprobs: list[Logprob] = []
        experts: list[list[list[int]]] = []
        reason: FinishReason | None = None
        text, right, stopped = "", 0, False
        for number in range(segment.scored, segment.scored + drawn):
            _check_finite(found, number)
            token = int(found["token"][number])
            if params.experts:
                experts.append(found["experts"][number].tolist())
            guessed = number < segment.scored + segment.drafts and int(sequence.tokens[sequence.known]) == token
            sequence.tokens[sequence.known] = token
            sequence.known += 1
            if number > segment.scored and segment.drafts:
                sequence.stored += 1  # its guess was stored, and right
            else:
                sequence.pending -= 1
            right += guessed
            if token in self.ends:
                reason = "stop"
                break
            if self.constraint is not None:
                self.constraint.accept(token)
                self.allowed = self.constraint.mask()
            tokens.append(token)
            if params.logprobs is not None:
                logprobs.append(_logprob(found, number, params.logprobs))
            piece = self.text.add(token)
            text += piece.text
            if piece.stopped:
                reason, stopped = "stop", True
                break
            if segment.drafts and not guessed:
                break
        if reason is None and sequence.known == len(sequence.tokens):
            reason = "length"
        if reason is not None and not stopped:
            text += self.text.end().text
        said = self.output()._replace(
            tokens=tuple(tokens), text=text, logprobs=tuple(logprobs), finish_reason=reason, prompt_logprobs=prompt,
            experts=tuple(experts),
        )  # fmt: skip
        return said, right


def _check_finite(found: dict[str, np.ndarray], number: int) -> None:
    if not found["finite"][number]:
        raise FloatingPointError("the model's scores are not finite")


def _logprob(found: dict[str, np.ndarray], number: int, alternatives: int) -> Logprob:
    _check_finite(found, number)
    best = zip(found["best"][number][:alternatives], found["best_logprob"][number][:alternatives], strict=True)
    token, logprob = int(found["token"][number]), float(found["logprob"][number])
    return Logprob(token, logprob, tuple((int(one), float(value)) for one, value in best))
