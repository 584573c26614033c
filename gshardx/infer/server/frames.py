"""What a client reads: outputs of the engine as OpenAI's JSON, for texts and for chats."""

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from gshardx.infer.request import FinishReason, Logprob, Output
from gshardx.infer.server.tokens import TokenTexts

Json = dict[str, Any]
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Part(NamedTuple):
    """Some, or all, that is said of one continuation. first: its beginning is among it."""

    first: bool
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    prompt_logprobs: tuple[Logprob, ...]
    experts: tuple[list[list[int]], ...]
    finish_reason: FinishReason | None


def part(outputs: Sequence[Output], first: bool) -> Part:
    """Of one or more outputs in turn."""
    return Part(
        first,
        "".join(one.text for one in outputs),
        tuple(token for one in outputs for token in one.tokens),
        tuple(logprob for one in outputs for logprob in one.logprobs),
        tuple(logprob for one in outputs for logprob in one.prompt_logprobs),
        tuple(chosen for one in outputs for chosen in one.experts),
        outputs[-1].finish_reason,
    )


class Voice(Protocol):
    """How an endpoint puts it. A whole answer is one part."""

    prefix: str
    whole: str
    chunk: str
    silent: bool

    def choice(self, index: int, said: Part, streamed: bool) -> Json: ...


class Completions:
    """/v1/completions.

    Args:
        texts: of tokens.
        logprobs: whether the client asked for them.
        echoed: for each index the prompt that is said first, text and tokens; empty: none is.
        silent: the prompt alone was asked for, and nothing after it.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, texts: TokenTexts, logprobs: bool, echoed: Sequence[tuple[str, Sequence[int]]], silent: bool
    ) -> None:
        self._texts, self._logprobs, self._echoed, self.silent = texts, logprobs, echoed, silent
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, said: Part, streamed: bool) -> Json:
        new = said._replace(text="", tokens=(), logprobs=()) if self.silent else said
        echo = self._echoed[index] if self._echoed and said.first else ("", ())
        found: Json = {
            "index": index,
            "text": echo[0] + new.text,
            "logprobs": None,
            "finish_reason": "length" if self.silent and said.finish_reason else said.finish_reason,
        }
        if self._logprobs:
            begins = [Logprob(token, None, ()) for token in echo[1][:1]]  # type: ignore[arg-type]  # nothing is before it
            found["logprobs"] = self._table(index, [*begins, *new.prompt_logprobs, *new.logprobs])
        return found | expert_fields(said, self._texts)

    def _table(self, index: int, logprobs: Sequence[Logprob]) -> Json:
        tokens = [self._texts.text(one.token) for one in logprobs]
        offset, offsets = self._offsets.get(index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [
                {self._texts.text(token): value for token, value in one.best} if one.logprob is not None else None
                for one in logprobs
            ],
            "text_offset": offsets,
        }


class Chat:
    """/v1/chat/completions."""

    prefix, whole, chunk, silent = "chatcmpl", "chat.completion", "chat.completion.chunk", False

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def choice(self, index: int, said: Part, streamed: bool) -> Json:
        role = {"role": "assistant"} if said.first else {}
        found: Json = {
            "index": index,
            "delta" if streamed else "message": {**role, "content": said.text},
            "logprobs": {"content": [self._logprob(one) for one in said.logprobs]} if self._logprobs else None,
            "finish_reason": said.finish_reason,
        }
        return found | expert_fields(said, self._texts)

    def _logprob(self, one: Logprob) -> Json:
        best = [self._token(token, value) for token, value in one.best]
        return {**self._token(one.token, one.logprob), "top_logprobs": best}

    def _token(self, token: int, logprob: float) -> Json:
        return {"token": self._texts.text(token), "logprob": logprob, "bytes": list(self._texts.bytes(token))}


def expert_fields(said: Part, texts: TokenTexts) -> Json:
    """Of a request with ``experts``: each new token's text, and the experts of the token before each draw."""
    if not said.experts:
        return {}
    return {"tokens": [texts.text(token) for token in said.tokens], "experts": list(said.experts)}


class Usage:
    """Counts tokens of a whole request."""

    def __init__(self, prompts: dict[str, int]) -> None:
        self._prompts, self._new = prompts, 0
        self._cached: dict[str, int] = {}

    def add(self, output: Output) -> None:
        self._new += len(output.tokens)
        self._cached[output.id] = max(self._cached.get(output.id, 0), output.cached_tokens)

    def json(self, silent: bool) -> Json:
        """silent: what was drawn was not asked for."""
        prompt, new = sum(self._prompts.values()), 0 if silent else self._new
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def envelope(id: str, kind: str, model: str, choices: list[Json]) -> Json:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> Json:
    """OpenAI's form of an error."""
    clean = message.encode(errors="replace").decode()  # a name that a client sent may hold lone surrogates
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def event(body: Json) -> bytes:
    """A frame of server-sent events."""
    return b"data: " + ENCODER.encode(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
