"""Which tokens may come next where the text must be JSON of a given schema; needs llguidance (the ``serve`` extra)."""

import functools
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 1 << 16
"""Characters of a schema's text."""
_KEPT = 16
"""Compiled grammars; most are some kB, the biggest that pass the trial some 40 MB."""
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 50_000,
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "max_items_in_row": 10_000,  # some 2,000 properties that may come next
    "verbose_errors": False,
}
"""llguidance's defaults for the rest, above all for the work of one step."""
_STYLE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
"""llguidance's options, in place of those that a schema may bring, some of which break the JSON. Whitespace between two
words of JSON ends: weak models would write nothing else."""
_TRIAL_LIMITS = {"seconds": 2, "memory": 64 << 20, "stack": 1 << 20}
_TRIAL = """
import json, resource, sys, threading
import llguidance

class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    def __call__(self, text):
        return list(text)

def compile():
    words = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    matcher = llguidance.LLMatcher(words, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits))
    matcher.compute_bitmask()
    print(json.dumps(matcher.get_error()))

grammar, limits, trial = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (trial["seconds"],) * 2)
resource.setrlimit(resource.RLIMIT_DATA, (trial["memory"],) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
threading.stack_size(trial["stack"])
thread = threading.Thread(target=compile)
thread.start()
thread.join()
"""


class Constraint:
    """Where one text stands in its grammar. Tokens are below ``vocab``; ``end`` ends the text."""

    def __init__(self, matcher: "LLMatcher", vocab: int, end: int) -> None:
        self._matcher, self._vocab, self._end = matcher, vocab, end

    def mask(self) -> np.ndarray:
        """Bit ``i % 32`` of word ``i // 32`` says whether token ``i`` may come next; uint32 ``[ceil(vocab / 32)]``.

        Not to be written to. The end token may where the text may end, and nothing else where it must.

        Raises:
            BadInput: the grammar has become too complex; nothing can follow.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        return np.frombuffer(bits, np.uint32, -(-self._vocab // 32))

    def accept(self, token: int) -> None:
        """Go on after ``token``.

        Raises:
            ValueError: it may not come next; nothing has changed.
            BadInput: as :meth:`mask`.
        """
        if 0 <= token < self._vocab and self._matcher.try_consume_tokens([token]):
            return
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        if token == self._end and self._matcher.is_stopped():  # nothing but the end may follow: no state to change
            return
        raise ValueError(f"token {token} may not come next")


class Grammars:
    """Grammars over one tokenizer's tokens. May be used by several threads.

    Args:
        tokenizer: its end token ends a text.
        vocab: the model's vocabulary, which may be larger than the tokenizer's; what is past that never comes next.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._matcher = functools.lru_cache(_KEPT)(self._compile)

    def start(self, schema: str) -> Constraint:
        """A constraint at its beginning. ``{"type": "object"}`` is any JSON object.

        The first call for a schema takes a tenth of a second or more, up to some seconds for one that is refused:
        don't have others' tokens wait for it.

        Args:
            schema: a JSON schema, as JSON.

        Raises:
            BadInput: not JSON, not a schema, one that llguidance has no grammar for or that takes it too long, or
                llguidance is missing.
        """
        if len(schema) > MAX_SCHEMA:
            raise BadInput(f"json_schema: {len(schema):,} characters; at most {MAX_SCHEMA:,}")
        return self._constraint(self._matcher(schema).deep_copy())

    def _compile(self, schema: str) -> "LLMatcher":
        try:
            import llguidance
        except ImportError as error:
            raise BadInput("json_schema: needs the package llguidance; pip install 'gshardx[serve]'") from error
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_parsed(schema) | {"x-guidance": _STYLE}))
        _try_out(grammar)
        limits = llguidance.LLParserLimits(**_LIMITS)
        matcher = llguidance.LLMatcher(self._words, grammar, log_level=0, limits=limits)
        self._constraint(matcher).mask()  # in every copy's cache from here on
        return matcher

    def _constraint(self, matcher: "LLMatcher") -> Constraint:
        return Constraint(matcher, self._vocab, self._tokenizer.end)

    @functools.cached_property
    def _words(self) -> "LLTokenizer":
        import llguidance

        try:
            return llguidance.LLTokenizer(
                self._tokenizer.text,
                n_vocab=self._vocab,
                eos_token=self._tokenizer.end,
                slices=llguidance.LLTokenizer.json_slices(),
            )
        except ValueError as error:
            raise BadInput(
                f"json_schema: not with this run's tokenizer ({_short(str(error))}); leave it out"
            ) from error


def _parsed(schema: str) -> dict[str, Any]:
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"json_schema: not JSON ({_short(str(error))}); give a JSON schema as JSON") from error
    if not isinstance(found, dict):
        raise BadInput("json_schema: not an object; give a JSON schema as JSON")
    return found


def _try_out(grammar: str) -> None:
    """Compile ``grammar`` in a process of its own first, which may run out of time, memory or stack.

    The library bounds none of them for all schemas: long chains of ``$ref`` overflow the stack, which ends the process,
    and a ``multipleOf`` of some millions takes minutes and gigabytes.

    Raises:
        BadInput: it did, or the grammar is wrong.
    """
    told = json.dumps([grammar, _LIMITS, _TRIAL_LIMITS])
    command = [sys.executable, "-P", "-c", _TRIAL]
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise BadInput("json_schema: not compiled in time; try again, or a simpler one") from error
    if done.returncode < 0:
        raise BadInput("json_schema: takes too much time or memory, or is too deep; give a simpler one")
    if done.returncode or not done.stdout:
        raise RuntimeError(f"llguidance could not be tried out: {done.stderr[-1000:]}")
    if reason := json.loads(done.stdout):
        raise _refused(reason)


def _refused(reason: str) -> BadInput:
    told = "no JSON satisfies it" if reason.startswith("NoExtension") else _short(reason)
    return BadInput(f"json_schema: {told}; give another schema")


def _short(reason: str) -> str:
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    return line if len(line) <= 200 else f"{line[:100]} ... {line[-90:]}"
