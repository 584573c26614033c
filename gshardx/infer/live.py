"""One continuation on its way: what it takes in of each call's results, and what it says of them."""

import dataclasses

import numpy as np

from gshardx.infer.request import FinishReason, Logprob, Output, Request
from gshardx.infer.scheduler import Segment, Sequence
from gshardx.infer.text import TextStream


@dataclasses.dataclass(eq=False)
class Live:
    """cached: tokens of the prompt that the prefix cache had, -1 before the first call. ends: tokens that end it."""

    request: Request
    choice: int
    sequence: Sequence
    text: TextStream
    ends: frozenset[int]
    cached: int = -1

    def output(self) -> Output:
        """Nothing new yet."""
        return Output(self.request.id, self.choice, (), "", (), None, cached_tokens=max(self.cached, 0))

    def take_in(self, segment: Segment, found: dict[str, np.ndarray], count: int) -> tuple[Output, int]:
        """The output of up to ``count`` drawn tokens, and how many of the segment's guesses were right.

        Each token after a guess means something only where the guess is the token drawn there.

        Raises:
            FloatingPointError: the model's scores were not finite.
        """
        sequence, params = self.sequence, self.request.params
        tokens: list[int] = []
        logprobs: list[Logprob] = []
        reason: FinishReason | None = None
        text, right = "", 0
        for number in range(min(count, len(sequence.tokens) - sequence.known)):
            if not found["finite"][number]:
                raise FloatingPointError("the model's scores are not finite")
            token = int(found["token"][number])
            guessed = number < segment.drafts and int(sequence.tokens[sequence.known]) == token
            sequence.tokens[sequence.known] = token
            sequence.known += 1
            if number and segment.drafts:
                sequence.stored += 1  # its guess was stored, and right
            else:
                sequence.pending -= 1
            right += guessed
            if token in self.ends:
                reason = "stop"
                break
            tokens.append(token)
            if params.logprobs is not None:
                logprobs.append(_logprob(token, found, number, params.logprobs))
            piece = self.text.add(token)
            text += piece.text
            if piece.stopped:
                return self._said(tokens, text, logprobs, "stop"), right
            if segment.drafts and not guessed:
                break
        if reason is None and sequence.known == len(sequence.tokens):
            reason = "length"
        if reason is not None:
            text += self.text.end().text
        return self._said(tokens, text, logprobs, reason), right

    def _said(self, tokens: list[int], text: str, logprobs: list[Logprob], reason: FinishReason | None) -> Output:
        return self.output()._replace(tokens=tuple(tokens), text=text, logprobs=tuple(logprobs), finish_reason=reason)


def _logprob(token: int, found: dict[str, np.ndarray], number: int, alternatives: int) -> Logprob:
    best = zip(found["best"][number][:alternatives], found["best_logprob"][number][:alternatives], strict=True)
    return Logprob(token, float(found["logprob"][number]), tuple((int(one), float(value)) for one, value in best))
