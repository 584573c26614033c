"""Outputs of an engine put together again, one answer a request."""

import dataclasses
from collections.abc import Iterable, Iterator

from gshardx.infer.request import FinishReason, Logprob, Output


@dataclasses.dataclass
class Answer:
    """A whole continuation."""

    id: str
    choice: int
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Logprob] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    cached_tokens: int = 0

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.finish_reason, self.error, self.cached_tokens = output.finish_reason, output.error, output.cached_tokens


class Answers:
    """Those that are not finished."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], Answer] = {}

    def finished(self, outputs: Iterable[Output]) -> Iterator[Answer]:
        """Take in ``outputs``; each answer once it is whole."""
        for output in outputs:
            key = output.id, output.choice
            answer = self._open.setdefault(key, Answer(*key))
            answer.add(output)
            if answer.finish_reason:
                yield self._open.pop(key)
