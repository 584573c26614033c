"""Many requests at once through a few compiled programs: admit, plan, compute, emit.

    engine = Engine(run.blueprint, run.variables, run.mesh, run.tokenizer)
    engine.submit(Request("a", run.tokenizer.encode("To be"), SamplingParams(max_new_tokens=50)))
    for output in engine.run():
        print(output.text, end="")

Nothing is compiled after ``Engine(...)``. What a request gets depends on nothing but itself: not on who else is
served, when it came, how its prompt was cut, nor whether its pages were there already or had to be given up meanwhile.
One thread may use an engine; it keeps one call of the device ahead of the results that it reads.
"""

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput
from gshardx.infer.fill import fill_decode, fill_step
from gshardx.infer.programs import Programs
from gshardx.infer.request import FinishReason, Logprob, Output, Request, SamplingParams
from gshardx.infer.scheduler import NeedsResults, Plan, Scheduler, Segment, Sequence
from gshardx.infer.settings import EngineConfig
from gshardx.infer.slots import SlotTables
from gshardx.infer.text import TextStream
from gshardx.infer.weights import separate
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import one_program_at_a_time
from gshardx.sharding.distributed import fetch


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made."""

    calls: int = 0
    tokens: int = 0
    """Computed for sequences."""
    padded_tokens: int = 0
    """Computed in all."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of prompts, found in the prefix cache."""
    drawn_tokens: int = 0
    retractions: int = 0


@dataclasses.dataclass(eq=False)
class _Live:
    """One continuation that is not finished."""

    request: Request
    choice: int
    sequence: Sequence
    text: TextStream
    ends: frozenset[int]
    cached: int = -1
    done: bool = False


@dataclasses.dataclass
class _Flight:
    """A call whose results have not been read."""

    plan: Plan
    result: jax.Array
    read: Any
    """From the words of the result to its fields."""
    places: list[list[int]]
    """Of each segment of each shard, its place in the result."""


class Engine:
    """Serves requests; see the head of this file.

    Args:
        blueprint, variables, mesh: the model, as :func:`gshardx.infer.load.load_run` gives it.
        tokenizer: ends sequences, and makes text of tokens.
        config: sizes.

    Raises:
        BadInput: sizes that can't be.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        variables: Variables,
        mesh: Mesh,
        tokenizer: Tokenizer,
        config: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.config, self.tokenizer, self.stats = config, tokenizer, Stats()
        blueprint, self._variables = separate(blueprint, variables, mesh)
        self.vocab = blueprint.vocab
        self.sizes = sizes = config.sizes(mesh)
        tokens, rows = config.token_buckets(), config.row_buckets()

        def compiled(tile: int) -> Programs:
            self.sizes = sizes._replace(tile=tile)
            return Programs(blueprint, self.sizes, mesh, tokens=tokens, rows=rows, samples=max(2, config.slots))

        self.programs = compiled(config.tile)
        while not self.programs.agree(self._variables):
            if self.sizes.tile == 2:
                warnings.warn("XLA's programs differ here: last digits depend on who else is served", stacklevel=2)
                break
            self.programs = compiled(max(2, self.sizes.tile // 2))
        self._state = self.programs.initial_state()
        self._tables = SlotTables(sizes)
        self.scheduler = Scheduler(
            shards=sizes.shards, slots=sizes.slots, pages=sizes.pages, page_size=sizes.page_size, budget=tokens[-1]
        )
        self._live: dict[Sequence, _Live] = {}
        self._flights: collections.deque[_Flight] = collections.deque()
        self._ahead = 0 if one_program_at_a_time(mesh) else 1
        self._early: list[Output] = []

    @property
    def idle(self) -> bool:
        """Nothing left to do or to say."""
        return not (self._live or self._flights or self._early)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BadInput: its prompt is empty, too long for ``max_length`` or the cache, or holds no token of this model.
        """
        prompt, params = np.asarray(request.prompt, np.int32), request.params
        total = len(prompt) + params.max_new_tokens
        if len(prompt) == 0:
            raise BadInput(f"request {request.id}: the prompt is empty; give at least one token")
        if total > self.config.max_length or not self.scheduler.fits(total):
            room = min(self.config.max_length, (self.sizes.pages - 1) * self.sizes.page_size)
            raise BadInput(
                f"request {request.id}: {len(prompt)} tokens of prompt and {params.max_new_tokens} new ones are over "
                f"the length of {room}; shorten one of them or raise max_length"
            )
        for token in (*prompt[(prompt < 0) | (prompt >= self.vocab)], *params.logit_bias, *params.stop_tokens):
            if not 0 <= token < self.vocab:
                raise BadInput(f"request {request.id}: no token {token}; there are 0 to {self.vocab - 1}")
        first = None
        for choice in range(params.n):
            tokens = np.zeros(total, np.int32)
            tokens[: len(prompt)] = prompt
            family: Hashable = request.family
            sequence = Sequence(tokens, len(prompt), family, request.priority, known=len(prompt), after=first)
            first = first or sequence
            ends = frozenset(params.stop_tokens) | (frozenset() if params.ignore_end else {self.tokenizer.end})
            self._live[sequence] = _Live(request, choice, sequence, TextStream(self.tokenizer, params.stop), ends)
            self.scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        """End a request, wherever it is; its pages and slots are free at once."""
        for live in [live for live in self._live.values() if live.request.id == id]:
            self._early.append(self._ended(live, "cancelled"))

    def run(self) -> Iterator[Output]:
        """Until nothing is left."""
        while not self.idle:
            yield from self.step()

    def step(self) -> list[Output]:
        """Start one call of the device, read the results of the one before, and return what there is to say."""
        said, self._early = self._early, []
        started = False
        with contextlib.suppress(NeedsResults):
            started = bool(self._live) and self._start()
        while self._flights and (not started or len(self._flights) > self._ahead):
            said += self._read(self._flights.popleft())
        return said

    def _start(self) -> bool:
        plan = self.scheduler.plan(self.config.steps)
        if not any(plan.segments):
            return False
        for segment in (one for segments in plan.segments for one in segments):
            self._install(segment.sequence)
        prompts = any(not one.draws or one.length > 1 for segments in plan.segments for one in segments)
        flight = self._prompt_call(plan) if prompts else self._decode_call(plan)
        self.scheduler.commit(plan)
        self._flights.append(flight)
        self.stats.calls += 1
        self.stats.retractions = self.scheduler.retractions
        return True

    def _install(self, sequence: Sequence) -> None:
        """Bring a slot's tables up to date with who is there now, and with its pages."""
        live = self._live[sequence]
        if not self._tables.holds(sequence):
            if live.cached < 0:
                live.cached = sequence.stored
                self.stats.prompt_tokens += sequence.prompt
                self.stats.cached_tokens += sequence.stored
            self._tables.install(sequence, live.request.params, live.choice, live.ends)
            if live.request.params.uses_history or live.request.params.logit_bias:
                self._admit(sequence, live.request.params)
        self._tables.refresh(sequence)

    def _admit(self, sequence: Sequence, params: SamplingParams) -> None:
        history = 2 * np.bincount(sequence.tokens[sequence.prompt : sequence.known], minlength=self.vocab)
        history[np.unique(sequence.tokens[: sequence.prompt])] += 1
        bias = np.zeros(self.vocab, np.float32)
        for token, value in params.logit_bias.items():
            bias[token] = value
        place = self.programs.admit.input_shardings[1]
        arguments = (np.int32(sequence.shard), np.int32(sequence.slot), history.astype(np.int32), bias)
        self._state = self.programs.admit(self._state, *(jax.device_put(x, place) for x in arguments))

    def _prompt_call(self, plan: Plan) -> _Flight:
        most = max(sum(one.length for one in segments) for segments in plan.segments)
        call = self.programs.step_for(most)
        buffer, given = call.blank()
        places = fill_step(given, plan, self._tables, self.sizes)
        self.stats.tokens += sum(one.length for segments in plan.segments for one in segments)
        tile = min(self.sizes.tile, given["token"].shape[1])
        self.stats.padded_tokens += self.sizes.shards * int(given["tiles"]) * tile
        self._state, result = call(self._variables, self._state, buffer)
        return _Flight(plan, result, call.result.views, places)

    def _decode_call(self, plan: Plan) -> _Flight:
        call = self.programs.decode_for(max(map(len, plan.segments)))
        buffer, given = call.blank()
        fill_decode(given, plan, self._tables, self.sizes)
        self.stats.tokens += int(given["limit"].sum())
        self.stats.padded_tokens += given["position"].size * int(given["steps"])
        self._state, result = call(self._variables, self._state, buffer)
        return _Flight(plan, result, call.result.views, [list(range(len(one))) for one in plan.segments])

    def _read(self, flight: _Flight) -> list[Output]:
        found = flight.read(fetch(flight.result))
        said = []
        for shard, (segments, places) in enumerate(zip(flight.plan.segments, flight.places, strict=True)):
            for segment, place in zip(segments, places, strict=True):
                live = self._live.get(segment.sequence)
                if live is not None and place >= 0:
                    mine = {name: values[:, shard, place] for name, values in found.items()}
                    said.append(self._emit(live, segment, mine, flight.plan.steps))
        return said

    def _emit(self, live: _Live, segment: Segment, found: dict[str, np.ndarray], steps: int) -> Output:
        """Take in the tokens of one sequence; a fault of its own ends it alone."""
        sequence, params = live.sequence, live.request.params
        tokens: list[int] = []
        logprobs: list[Logprob] = []
        text, stopped_by_text = "", False
        reason: FinishReason | None = None
        try:
            for number in range(min(steps, len(sequence.tokens) - sequence.known)):
                if not found["finite"][number]:
                    raise FloatingPointError("the model's scores are not finite")
                token = int(found["token"][number])
                sequence.tokens[sequence.known] = token
                sequence.known, sequence.pending = sequence.known + 1, sequence.pending - 1
                self.stats.drawn_tokens += 1
                if token in live.ends:
                    reason = "stop"
                    break
                tokens.append(token)
                if params.logprobs is not None:
                    logprobs.append(_logprob(token, found, number, params.logprobs))
                piece = live.text.add(token)
                text += piece.text
                if piece.stopped:
                    reason, stopped_by_text = "stop", True
                    break
            if reason is None and sequence.known == len(sequence.tokens):
                reason = "length"
            if reason is None:
                return self._said(live, tokens, text, logprobs)
            if not stopped_by_text:
                text += live.text.end().text
            return self._ended(live, reason, tokens, text, logprobs)
        except Exception as error:  # whatever it is, the others go on
            return self._ended(live, "error", tokens, text, logprobs, f"{type(error).__name__}: {error}")

    def _said(self, live: _Live, tokens: list[int], text: str, logprobs: list[Logprob]) -> Output:
        return Output(
            live.request.id, live.choice, tuple(tokens), text, tuple(logprobs), None, cached_tokens=max(live.cached, 0)
        )

    def _ended(
        self,
        live: _Live,
        reason: FinishReason,
        tokens: list[int] | None = None,
        text: str = "",
        logprobs: list[Logprob] | None = None,
        error: str = "",
    ) -> Output:
        """Give back what it has, and say the last of it."""
        del self._live[live.sequence]
        self.scheduler.finish(live.sequence)
        last = self._said(live, tokens or [], text, logprobs or [])
        return last._replace(finish_reason=reason, error=error)


def _logprob(token: int, found: dict[str, np.ndarray], number: int, alternatives: int) -> Logprob:
    best = zip(found["best"][number][:alternatives], found["best_logprob"][number][:alternatives], strict=True)
    return Logprob(token, float(found["logprob"][number]), tuple((int(one), float(value)) for one, value in best))
