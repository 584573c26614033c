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
import time
from collections.abc import Hashable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput
from gshardx.infer.costs import measured_costs
from gshardx.infer.depth import Depth
from gshardx.infer.drafts import Drafter, FewerExperts, PromptLookup
from gshardx.infer.exchange import choose_exchange
from gshardx.infer.fill import fill_decode, fill_step
from gshardx.infer.grammar import Grammars
from gshardx.infer.live import Live
from gshardx.infer.pace import Pace
from gshardx.infer.program import DeviceState
from gshardx.infer.programs import Call, agreeing_programs
from gshardx.infer.quantize import quantize
from gshardx.infer.request import Output, Request, SamplingParams
from gshardx.infer.scheduler import NeedsResults, Plan, Scheduler, Segment, Sequence
from gshardx.infer.settings import SCORES, EngineConfig, batch_shards
from gshardx.infer.slots import SlotTables
from gshardx.infer.text import TextStream
from gshardx.infer.weights import fewer_experts, placed, separate
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import CompiledStep, one_program_at_a_time
from gshardx.sharding.distributed import fetch
from gshardx.sharding.guard import count_compiles


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
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    """Of the guesses, those that were right."""
    retractions: int = 0
    compilations: int = 0
    """While serving; there is nothing to compile."""
    expert_load: Int[np.ndarray, "layer e"] = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """Choices that each expert of each MoE layer took."""
    dropped_choices: int = 0
    """That no expert took; there is room for all."""


@dataclasses.dataclass
class _Flight:
    """A call whose results have not been read."""

    plan: Plan
    call: Call
    steps: int
    """Of the call, one after the other: tiles of ``step``, tokens of ``decode``."""
    result: jax.Array
    places: list[list[range]]
    """Of each segment of each shard, its places in the result; of ``decode`` one, with tokens in turn."""
    begun: float = dataclasses.field(default_factory=time.perf_counter)


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
        self.config, self.tokenizer = config, tokenizer
        rows = config.slots * batch_shards(mesh)
        self.exchange = choose_exchange(blueprint.config, mesh, rows, config.exchange)
        blueprint, self._variables = separate(blueprint, variables, mesh, self.exchange)
        if config.weights is not None:
            blueprint, self._variables = quantize(blueprint, self._variables, config.weights)
        self.vocab = blueprint.vocab
        self.choices = blueprint.bind(blueprint.params).stack.router.choices(training=False)
        layers = len(self._variables.params["stack"]["separate"])
        self._places = np.tile(np.arange(blueprint.config.moe.num_experts), (layers, 1))
        self.stats = Stats(expert_load=np.zeros_like(self._places))
        self.grammars = Grammars(tokenizer, self.vocab)
        drafter = None
        if config.drafts == "fewer_experts":
            drafter = fewer_experts(blueprint, config.draft_experts, mesh, self.exchange)
        self.programs, sizes = agreeing_programs(blueprint, self._variables, mesh, config, self.exchange, drafter)
        self.sizes = sizes
        self._drafter: Drafter | None = None
        if config.drafts is not None:
            self._drafter = PromptLookup() if drafter is None else FewerExperts(self._draw_drafts)
            self._depth = Depth(config.draft_depth, measured_costs(self.programs, self._variables, sizes))
        self._state = self.programs.initial_state()  # after all trials, which had a cache of their own
        self._tables = SlotTables(sizes)
        self.scheduler = Scheduler(
            shards=sizes.shards,
            slots=sizes.slots,
            pages=sizes.pages,
            page_size=sizes.page_size,
            budget=max(self.programs.steps),
            scores=SCORES,
        )
        self._live: dict[Sequence, Live] = {}
        self._flights: collections.deque[_Flight] = collections.deque()
        self._ahead = 0 if one_program_at_a_time(mesh) else 1
        self._early: list[Output] = []
        self._pace, self._read_at = Pace(config.ahead_ms), 0.0

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
        constraints = [
            None if params.json_schema is None else self.grammars.start(params.json_schema) for _ in range(params.n)
        ]
        first = None
        for choice, constraint in enumerate(constraints):
            tokens = np.zeros(total, np.int32)
            tokens[: len(prompt)] = prompt
            family: Hashable = request.family
            sequence = Sequence(tokens, len(prompt), family, request.priority, known=len(prompt), after=first)
            if first is None and params.prompt_logprobs is not None:
                sequence.scored = 1
            first = first or sequence
            ends = frozenset(params.stop_tokens) | (frozenset() if params.ignore_end else {self.tokenizer.end})
            text = TextStream(self.tokenizer, params.stop)
            self._live[sequence] = Live(request, choice, sequence, text, ends, constraint)
            self.scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        """End a request, wherever it is; its pages and slots are free at once."""
        for live in [live for live in self._live.values() if live.request.id == id]:
            self._early.append(self._ended(live, live.output()._replace(finish_reason="cancelled")))

    def move_experts(self, places: Int[np.ndarray, "layer e"]) -> None:
        """Put each layer's experts elsewhere: onto other devices, where the mesh splits them.

        No program is compiled again; last digits may change, as a token's experts are summed up in another order.

        Args:
            places: for each MoE layer where each expert goes, a permutation.

        Raises:
            BadInput: not that.
        """
        if places.shape != self._places.shape or (np.sort(places) != np.arange(places.shape[1])).any():
            raise BadInput(f"places {list(places.shape)}: give a permutation of the experts for each layer, "
                           f"{list(self._places.shape)}")  # fmt: skip
        self._variables = self._variables._replace(params=placed(self._variables.params, self._places, places))
        self._places = places.copy()

    def run(self) -> Iterator[Output]:
        """Until nothing is left."""
        while not self.idle:
            yield from self.step()

    def step(self) -> list[Output]:
        """Start one call of the device, read the results of the one before, and return what there is to say."""
        with count_compiles() as count:
            said = self._step()
        self.stats.compilations += len(count.compiled)
        return said

    def _step(self) -> list[Output]:
        said, self._early = self._early, []
        drafts: dict[Sequence, int] = {}
        constrained = any(live.allowed is not None for live in self._live.values())
        if self._drafter is not None or constrained:  # what comes next depends on what came last
            said += self._read_all()
        if self._drafter is not None:
            drafts = self._wanted_drafts(self._drafter)
        started = False
        with contextlib.suppress(NeedsResults):
            started = bool(self._live) and self._start(1 if constrained else self._steps(), drafts)
        while self._flights and (not started or len(self._flights) > self._ahead or self._far_ahead()):
            said += self._read(self._flights.popleft())
        return said

    def _steps(self) -> int:
        """Tokens to draw in one call where all write. Where no slot is free, nobody could come in between."""
        if not any(shard.slots for shard in self.scheduler.shards):
            return self.config.steps
        rows = max(len(shard.running) for shard in self.scheduler.shards)
        return self._pace.steps(self.programs.decode_for(rows), self.config.steps)

    def _far_ahead(self) -> bool:
        return self._pace.enough((flight.call, flight.steps) for flight in self._flights)

    def _wanted_drafts(self, drafter: Drafter) -> dict[Sequence, int]:
        """How many tokens to guess for whom. Penalties depend on the tokens between, so they go without."""
        rows = [one for one in self.scheduler.running if one.todo == 1 and one.room > 1]
        plain = [one for one in rows if not self._live[one].request.params.uses_history]
        counts = {one: drafter.available(one, min(self.config.draft_depth, one.room - 1)) for one in plain}
        return self._depth.choose({one: count for one, count in counts.items() if count}, max(1, len(rows)))

    def _draw_drafts(self, segments: list[list[Segment]], steps: int) -> list[list[list[int]]]:
        """What :class:`FewerExperts` asks for."""
        one_each = [[Segment(one.sequence, one.start, 1, True) for one in each] for each in segments]
        call = self.programs.draft_for(max(map(len, one_each)))
        buffer, given = call.blank()
        fill_decode(given, Plan(one_each, steps), self._tables, self.sizes)
        self._state, result = call(self._variables, self._state, buffer)
        drawn = call.result.views(fetch(result))["token"]
        return [[drawn[:steps, shard, row].tolist() for row in range(len(each))] for shard, each in enumerate(one_each)]

    def _start(self, steps: int, drafts: dict[Sequence, int]) -> bool:
        plan = self.scheduler.plan(steps, drafts)
        if not any(plan.segments):
            return False
        for segment in (one for segments in plan.segments for one in segments):
            self._install(segment.sequence)
            allowed = self._live[segment.sequence].allowed
            if allowed is not None and segment.draws:
                self._write(self.programs.constrain, segment.sequence, allowed)
        if self._drafter is not None and any(one.drafts for segments in plan.segments for one in segments):
            self._drafter.write(plan.segments)
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
        self._write(self.programs.admit, sequence, history.astype(np.int32), bias)

    def _write(self, program: CompiledStep[..., DeviceState], sequence: Sequence, *rows: np.ndarray) -> None:
        """Bring a sequence's rows of the device's tables up to date."""
        place = program.input_shardings[1]
        arguments = (np.int32(sequence.shard), np.int32(sequence.slot), *rows)
        self._state = program(self._state, *(jax.device_put(x, place) for x in arguments))

    def _prompt_call(self, plan: Plan) -> _Flight:
        most = max(sum(one.length for one in segments) for segments in plan.segments)
        call = self.programs.step_for(most)
        buffer, given = call.blank()
        places = fill_step(given, plan, self._tables, self.sizes)
        self.stats.tokens += sum(one.length for segments in plan.segments for one in segments)
        tile = min(self.sizes.tile, given["token"].shape[1])
        self.stats.padded_tokens += self.sizes.shards * int(given["tiles"]) * tile
        self._state, result = call(self._variables, self._state, buffer)
        return _Flight(plan, call, int(given["tiles"]), result, places)

    def _decode_call(self, plan: Plan) -> _Flight:
        call = self.programs.decode_for(max(map(len, plan.segments)))
        buffer, given = call.blank()
        fill_decode(given, plan, self._tables, self.sizes)
        self.stats.tokens += int(given["limit"].sum())
        self.stats.padded_tokens += given["position"].size * int(given["steps"])
        self._state, result = call(self._variables, self._state, buffer)
        places = [[range(i, i + 1) for i in range(len(one))] for one in plan.segments]
        return _Flight(plan, call, plan.steps, result, places)

    def _read_all(self) -> list[Output]:
        said = []
        while self._flights:
            said += self._read(self._flights.popleft())
        return said

    def _read(self, flight: _Flight) -> list[Output]:
        found = flight.call.result.views(fetch(flight.result))
        began, self._read_at = max(flight.begun, self._read_at), time.perf_counter()  # one runs after the other
        self._pace.learn(flight.call, flight.steps, self._read_at - began)
        load = found.pop("load").sum(0)
        self.stats.expert_load += load[:, :-1]
        self.stats.dropped_choices += int(load[:, -1].sum())
        said = []
        for shard, (segments, places) in enumerate(zip(flight.plan.segments, flight.places, strict=True)):
            for segment, own in zip(segments, places, strict=True):
                live = self._live.get(segment.sequence)
                if live is not None and own:
                    # ``decode``: tokens in turn at one place; guesses: one call, a place each.
                    mine = {name: values[:, shard, own.start : own.stop] for name, values in found.items()}
                    mine = {name: values.reshape(-1, *values.shape[2:]) for name, values in mine.items()}
                    said.append(self._emit(live, segment, mine, max(flight.plan.steps, len(own))))
        return said

    def _emit(self, live: Live, segment: Segment, found: dict[str, np.ndarray], count: int) -> Output:
        """Take in the tokens of one sequence; a fault of its own ends it alone."""
        known = live.sequence.known
        try:
            output, right = live.take_in(segment, found, count)
        except Exception as error:  # whatever it is, the others go on
            return self._ended(live, live.output()._replace(finish_reason="error", error=_told(error)))
        self.stats.drawn_tokens += live.sequence.known - known
        if segment.drafts:
            self._depth.learn(live.sequence, right, segment.drafts)
            self.stats.guessed_tokens += segment.drafts
            self.stats.accepted_tokens += right
        return output if output.finish_reason is None else self._ended(live, output)

    def _ended(self, live: Live, last: Output) -> Output:
        """Give back what it has."""
        del self._live[live.sequence]
        self.scheduler.finish(live.sequence)
        if self._drafter is not None:
            self._drafter.forget(live.sequence)
            self._depth.forget(live.sequence)
        return last


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
