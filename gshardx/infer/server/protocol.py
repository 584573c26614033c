"""Requests as clients write them: OpenAI's fields, and vLLM's names for what OpenAI lacks.

A field that nobody knows is an error that names the nearest one: a misspelt ``max_token`` that is quietly ignored costs
its author more. Fields that only mean something at OpenAI are taken and ignored.
"""

import difflib
import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gshardx.errors import BadInput
from gshardx.infer.request import MAX_STOP_TOKENS, SamplingParams
from gshardx.infer.sampling import TOP

MAX_PROMPTS = 128
"""In one request."""
MAX_BIASES = 1024
"""Tokens with a bias."""
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")

Text = Annotated[str, Field(max_length=1 << 20)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=1 << 18, fail_fast=True)]
"""Its first error is the only one: to tell of a quarter of a million takes seconds."""
Stop = Annotated[Text, Field(min_length=1)]


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"{len(given):,} tokens; at most {MAX_BIASES:,}")
    return given


Biases = Annotated[
    dict[Token, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few), Field(max_length=MAX_BIASES)
]


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    schema_: dict[str, Any] = Field(alias="schema")
    name: str = ""
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """text, any JSON object, or what satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """Raises:
        BadInput: the schema is missing.
        """
        if self.type == "json_schema":
            if self.json_schema is None:
                raise BadInput("response_format: json_schema is missing; give the schema under json_schema.schema")
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class Form(BaseModel):
    """A body."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {name: value for name, value in given.items() if name not in IGNORED}
        for name, value in list(kept.items()):
            if name not in cls.model_fields:
                if value not in (None, [], {}):
                    nearest = difflib.get_close_matches(str(name)[:64], cls.model_fields, n=1, cutoff=0.0)[0]
                    raise ValueError(f"unknown field {str(name)[:64]!r}; did you mean {nearest}?")
                del kept[name]
        return kept


class Sampling(Form):
    """What all requests for text share."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_PROMPTS)
    temperature: float | None = Field(None, ge=0, le=1e4)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: from all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    logit_bias: Biases | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="default: another each time")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS - 1)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    experts: bool = Field(False, description="report the experts that each token went to, with streams")

    def params(self, max_new_tokens: int, logprobs: int | None, **more: Any) -> SamplingParams:
        """Raises:
        BadInput: a value out of its range.
        """
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "json_schema": self.response_format and self.response_format.schema_text(),
        }
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            n=self.n,
            seed=seed,
            logprobs=logprobs,
            stop=stop,
            stop_tokens=tuple(self.stop_token_ids or ()),
            ignore_end=more.pop("ignore_end", self.ignore_eos),
            experts=self.experts,
            **more,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)] | Tokens | Annotated[
        list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)
    ]  # fmt: skip
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="default: 16, as OpenAI's")
    logprobs: int | None = Field(None, ge=0, le=TOP)
    echo: bool = Field(False, description="begin with the prompt, and with logprobs its log-probabilities")
    best_of: int | None = Field(None, ge=1, le=1, description="no more than 1: use n")
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: as many as there is room for")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP)

    def alternatives(self) -> int | None:
        """What SamplingParams calls ``logprobs``."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Form):
    """POST /tokenize."""

    model: str | None = None
    prompt: Text
    add_special_tokens: Literal[False] = False


class DetokenizeRequest(Form):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 18, fail_fast=True)]
