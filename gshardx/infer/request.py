"""What a caller asks for, and what comes back."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from gshardx.errors import BadInput
from gshardx.infer.sampling import TOP

MAX_STOP_TOKENS = 8
"""Compared on the device; OpenAI allows 4 stop sequences."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Names as OpenAI's and vLLM's.

    Raises:
        BadInput: a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 takes the best token."""
    top_k: int = 0
    """Draw from the k best tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest best tokens that reach this probability together."""
    min_p: float = 0.0
    """Draw from tokens of at least this share of the best one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens that prompt or output hold."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens that the output holds."""
    frequency_penalty: float = 0.0
    """The same for each time that it does."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of tokens, -100 to 100."""
    seed: int = 0
    """The same seed, prompt and settings give the same text."""
    n: int = 1
    """Continuations."""
    logprobs: int | None = None
    """Report each token's log-probability, and those of so many best alternatives."""
    stop: tuple[str, ...] = ()
    """Text that ends the output, and is not part of it."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the output beside the tokenizer's own end, and are not part of it."""
    ignore_end: bool = False
    """Go on after the tokenizer's end token."""
    prompt_logprobs: int | None = None
    """Report the log-probabilities of the prompt's tokens after the first, as ``logprobs`` does of new ones. What the
    prefix cache has of the prompt is then computed again."""
    json_schema: str | None = None
    """A JSON schema that the text satisfies, as JSON; tokens that would break it are not drawn."""
    experts: bool = False
    """Report which experts tokens went to."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, math.inf),
            ("temperature", 0, 1e4),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 1e-3, 1e3),
            ("presence_penalty", -100, 100),
            ("frequency_penalty", -100, 100),
            ("seed", 0, 2**32 - 1),
            ("n", 1, 128),
            ("logprobs", 0, TOP),
            ("prompt_logprobs", 0, TOP),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                until = f"to {high:g}" if high < math.inf else "or more"
                raise BadInput(f"{name} = {value}: must be {low:g} {until}")
        if len(self.stop_tokens) >= MAX_STOP_TOKENS:
            raise BadInput(f"stop_tokens: {len(self.stop_tokens)} of them; at most {MAX_STOP_TOKENS - 1}")
        if "" in self.stop:
            raise BadInput("stop: an empty text would end every output; leave it out")
        if self.json_schema is not None and self.ignore_end:
            raise BadInput("json_schema with ignore_end: nothing may follow a JSON value; leave one of them out")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise BadInput(f"logit_bias of token {token} = {bias}: must be -100 to 100")

    @property
    def uses_history(self) -> bool:
        """Whether scores depend on the tokens so far."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0) or self.json_schema is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt of one or more tokens, int32.

    id: the caller's name for it. priority: lower ones go first. family: what else keys and values depend on, such as an
    adapter: prefixes are shared within a family.
    """

    id: str
    prompt: np.ndarray
    params: SamplingParams
    priority: int = 0
    family: Hashable = None


class Logprob(NamedTuple):
    """Of a token; best: the most probable tokens and theirs."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


FinishReason = Literal["stop", "length", "cancelled", "error"]


class Output(NamedTuple):
    """New tokens of one continuation.

    text: what they add to the text, in whole characters; it may lag behind, while a stop text may still be coming.
    logprobs: one a token, if asked for. finish_reason: with the last output. error: of a request that failed, a line.
    """

    id: str
    choice: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...]
    finish_reason: FinishReason | None
    error: str = ""
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    prompt_logprobs: tuple[Logprob, ...] = ()
    """Of further tokens of the prompt, if asked for; before any new token."""
    experts: tuple[list[list[int]], ...] = ()
    """If asked for, one a draw: for each MoE layer the experts, best first, of the token *before* the one drawn. So the
    first is of the prompt's last token, and the last token of an answer, after which nothing was drawn, has none.
    """
