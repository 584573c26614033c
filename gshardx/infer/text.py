"""From tokens to the text that a caller may see, as they come."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import decoders

from gshardx.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    text: str
    stopped: bool
    """A stop text was found; ``text`` ends before it."""


class TextStream:
    """The text of one continuation, in whole characters, cut before the first of ``stops``.

    What may be the beginning of a stop text is held back until it is clear that it is not.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._decoded, self._held = 0, ""

    def add(self, token: int) -> Piece:
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.inner, token) or ""
        self._decoded += len(piece)
        return self._pass_on(piece)

    def end(self) -> Piece:
        """What is left when no token follows, an unfinished character as U+FFFD."""
        piece = self._pass_on(self._tokenizer.decode(self._tokens)[self._decoded :])
        return piece if piece.stopped else Piece(piece.text + self._held, False)

    def _pass_on(self, piece: str) -> Piece:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            return Piece(text[: min(found)], True)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return Piece(text[: len(text) - held], False)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
