"""Who computes what in the next call of the device: continuous batching (Orca) with chunked prefill (arXiv 2403.02310).

All on the host, in whole numbers; nothing here knows of arrays on devices. Sequences are served in the order of
priority, then of arrival; one that waits gains a priority every ``AGEING`` calls, so that it is served at last
whatever comes. Those that decode always go on; what is left of a call's budget goes to prompts, piece by piece. A
waiting sequence is let in when its prompt and a part of what it may still write fit. Where pages run out all the same,
the last in order gives up its pages and waits; later it computes its tokens again (retraction), which changes none.
"""

import dataclasses
import itertools
import sys
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from gshardx.infer.pages import Lease, PagePool

AGEING = 512
"""Calls of waiting that are worth one priority."""
EXPECTED_AT_FIRST, EXPECTED_AT_LEAST, FORGOTTEN = 0.7, 0.1, 0.98
"""Share of its remaining tokens that a sequence is expected to write: it shrinks by FORGOTTEN a call to no less than
EXPECTED_AT_LEAST, and starts again when somebody is retracted (SGLang's scheduler does alike)."""


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what was written after it.

    Attributes:
        tokens: room for all that it may hold; the first ``known`` are known to the host.
        prompt: tokens of the prompt.
        pending: further tokens that the device has drawn or is about to.
        stored: tokens whose keys and values have been, or are about to be, stored.
        lease: its pages, while it runs.
        slot: its place on the device, while it runs.
        shard: of the mesh, while it runs.
        runs: how often it was admitted.
        scored: tokens of the prompt whose log-probabilities the device was asked for; all of it where nobody wants any.
    """

    tokens: np.ndarray
    prompt: int
    family: Hashable
    priority: int
    arrival: int = 0
    waits_since: int = 0
    known: int = 0
    pending: int = 0
    stored: int = 0
    lease: Lease | None = None
    slot: int = -1
    shard: int = 0
    runs: int = 0
    scored: int = sys.maxsize
    after: "Sequence | None" = None
    """Wait until this one has its prompt stored, and share it."""

    @property
    def length(self) -> int:
        return self.known + self.pending

    @property
    def todo(self) -> int:
        """Tokens without keys and values; 1: it decodes."""
        return self.known + self.pending - self.stored

    @property
    def room(self) -> int:
        """Tokens that it may still write."""
        return len(self.tokens) - self.known - self.pending

    @property
    def shareable(self) -> int:
        """Tokens at its beginning that it need not compute itself."""
        return min(self.known, self.scored) if self.scored < self.prompt else self.known

    def scores(self, start: int, length: int) -> int:
        """Tokens of the prompt that follow one of these, and whose log-probabilities are wanted."""
        return max(0, min(start + length, self.prompt - 1) - max(self.scored, start + 1) + 1)


class Segment(NamedTuple):
    """``length`` tokens of a sequence from ``start``, all stored before or known, but for one that may be pending.

    draws: a token is drawn after the last one. drafts: of the tokens, how many at the end are guesses. scored: of the
    prompt's tokens after the first of these, how many at the end are scored.
    """

    sequence: Sequence
    start: int
    length: int
    draws: bool
    drafts: int = 0
    scored: int = 0

    @property
    def places(self) -> int:
        """At its end, where the device looks at scores."""
        return self.scored + (1 + self.drafts) * self.draws


class Plan(NamedTuple):
    """segments: for each shard. steps: tokens to draw in turn for each sequence, 1 if any prompt is computed."""

    segments: list[list[Segment]]
    steps: int


class NeedsResults(Exception):
    """Somebody must be retracted whose last token is not here yet: fetch it, then plan again."""


class Shard:
    """One device's pages and slots."""

    def __init__(self, pages: int, page_size: int, slots: int) -> None:
        self.pool = PagePool(pages, page_size)
        self.slots = list(range(slots - 1, -1, -1))
        self.running: list[Sequence] = []


class Scheduler:
    """Args:

    shards: of the mesh's batch axes.
    slots: sequences that run at once on each.
    pages, page_size: of each shard's cache; page 0 is nobody's.
    budget: tokens of one call on each shard; at least ``slots``.
    scores: of these, those of prompts that may be scored.
    """

    def __init__(self, *, shards: int, slots: int, pages: int, page_size: int, budget: int, scores: int) -> None:
        self.shards = [Shard(pages, page_size, slots) for _ in range(shards)]
        self.budget, self.page_size, self.scores = budget, page_size, scores
        self.waiting: list[Sequence] = []
        self.calls = self.retractions = 0
        self._expected = EXPECTED_AT_FIRST
        self._arrivals = itertools.count()

    @property
    def running(self) -> list[Sequence]:
        return [sequence for shard in self.shards for sequence in shard.running]

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens can run at all."""
        return self._pages(tokens) < self.shards[0].pool.count

    def add(self, sequence: Sequence) -> None:
        sequence.arrival, sequence.waits_since = next(self._arrivals), self.calls
        self.waiting.append(sequence)

    def plan(self, steps: int, drafts: dict[Sequence, int] | None = None) -> Plan:
        """The next call; admits and retracts, but stores nothing before :meth:`commit`.

        Args:
            steps: tokens to draw at once where all sequences decode.
            drafts: guessed tokens that follow a sequence's known ones.

        Raises:
            NeedsResults: see there.
        """
        drafts, retracted = drafts or {}, self.retractions
        computed: list[list[Segment]] = []
        for shard in self.shards:
            shard.running.sort(key=self._order)
            segments = self._decodes(shard, drafts)
            computed.append(self._prompts(shard, segments))
        if self.retractions > retracted:
            computed = [[one for one in segments if one.sequence.lease is not None] for segments in computed]
        else:
            for sequence in sorted(self.waiting, key=self._order):
                if not self._admit(sequence, computed):
                    break
        if any(one.length > 1 or not one.draws for segments in computed for one in segments):
            steps = 1
        while steps > 1 and not all(self._room_for(one.sequence, steps) for segments in computed for one in segments):
            steps //= 2
        return Plan(computed, steps)

    def commit(self, plan: Plan) -> None:
        """The call was made: count what it stores and draws. Guesses that were right the caller counts, before the next
        plan."""
        self.calls += 1
        self._expected = max(EXPECTED_AT_LEAST, self._expected * FORGOTTEN)
        for sequence, start, length, draws, drafts, scored in itertools.chain.from_iterable(plan.segments):
            drawn = min(plan.steps, sequence.room) if draws else 0
            sequence.stored = start + length - drafts + max(drawn - 1, 0)
            sequence.pending += drawn
            sequence.scored += scored
            if length > 1 or not draws:
                self._keep(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give back what a sequence has, running or waiting; its full pages stay for others."""
        if sequence.lease is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            return
        self._keep(sequence)
        self._leave(sequence)

    def _order(self, sequence: Sequence) -> tuple[int, int]:
        waited = (self.calls - sequence.waits_since) // AGEING if sequence.lease is None else 0
        return sequence.priority - waited, sequence.arrival

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _keep(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        pool = self.shards[sequence.shard].pool
        pool.keep(sequence.lease, sequence.tokens[: min(sequence.stored, sequence.known)])

    def _decodes(self, shard: Shard, drafts: dict[Sequence, int]) -> list[Segment]:
        segments: list[Segment] = []
        prompts = any(one.todo > 1 for one in shard.running)
        spare = (
            0 if prompts else (self.budget - len(shard.running)) // 2
        )  # what guesses may take; the rest lets others in
        for sequence in list(shard.running):
            if sequence.lease is None or sequence.todo != 1 or sequence.room < 1:
                continue
            guessed = max(0, min(drafts[sequence], sequence.room - 1, spare)) if sequence in drafts else 0
            if guessed and not self._room_for(sequence, 1 + guessed):
                guessed = 0
            if self._make_room(shard, sequence, sequence.stored + 1):
                segments.append(Segment(sequence, sequence.stored, 1 + guessed, True, guessed))
                spare -= guessed
        return segments

    def _prompts(self, shard: Shard, segments: list[Segment]) -> list[Segment]:
        for sequence in list(shard.running):
            if sequence.lease is not None and sequence.todo > 1:
                self._add_piece(shard, sequence, segments)
        return segments

    def _add_piece(self, shard: Shard, sequence: Sequence, segments: list[Segment]) -> None:
        """As much of its prompt as the call's budgets leave, if anything."""
        start, length = sequence.stored, min(sequence.todo, self.budget - sum(one.length for one in segments))
        scores = self.scores - sum(one.scored for one in segments)
        if sequence.scores(start, length) > scores:
            length = max(sequence.scored - 1 - start, 0) + scores
        if length > 0 and self._make_room(shard, sequence, start + length):
            draws, scored = length == sequence.todo, sequence.scores(start, length)
            segments.append(Segment(sequence, start, length, draws, scored=scored))

    def _room_for(self, sequence: Sequence, more: int) -> bool:
        """Pages for as many further tokens as it will store."""
        assert sequence.lease is not None
        wanted = min(sequence.stored + more, len(sequence.tokens))
        return self.shards[sequence.shard].pool.grow(sequence.lease, wanted)

    def _make_room(self, shard: Shard, sequence: Sequence, tokens: int) -> bool:
        """Pages for ``tokens`` tokens, taken from those after it in order if need be; False: it gave up its own."""
        assert sequence.lease is not None
        while not shard.pool.grow(sequence.lease, tokens):
            victim = max(shard.running, key=self._order)
            self._retract(victim)
            if victim is sequence:
                return False
        return True

    def _retract(self, sequence: Sequence) -> None:
        if sequence.pending:
            raise NeedsResults
        self.retractions += 1
        self._expected = EXPECTED_AT_FIRST
        self._leave(sequence)
        sequence.stored, sequence.waits_since = 0, self.calls
        self.waiting.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        shard = self.shards[sequence.shard]
        assert sequence.lease is not None
        shard.pool.close(sequence.lease)
        shard.slots.append(sequence.slot)
        shard.running.remove(sequence)
        sequence.lease, sequence.slot = None, -1

    def _admit(self, sequence: Sequence, computed: list[list[Segment]]) -> bool:
        """Start it on the shard that knows most of its prompt, or has most room; False where none can take it now."""
        if sequence.after is not None and _computes_prompt(sequence.after):
            return True  # passed over: others may go before it
        tokens = sequence.tokens[: sequence.shareable]
        best: tuple[int, int, Shard, Lease] | None = None
        for shard, segments in zip(self.shards, computed, strict=True):
            if not shard.slots or sum(one.length for one in segments) >= self.budget:
                continue
            lease = shard.pool.open(sequence.family, tokens)
            known, free = len(lease.nodes), shard.pool.free + shard.pool.evictable
            wanted = self._pages(sequence.known + int(self._expected * sequence.room)) - known
            suits = wanted + self._promised(shard) <= free or not shard.running
            if suits and (best is None or (known, free) > best[:2]):
                if best is not None:
                    best[2].pool.close(best[3])
                best = (known, free, shard, lease)
            else:
                shard.pool.close(lease)
        if best is None:
            return False
        known, _, shard, lease = best
        self.waiting.remove(sequence)
        sequence.lease, sequence.slot, sequence.runs = lease, shard.slots.pop(), sequence.runs + 1
        sequence.shard, sequence.stored = self.shards.index(shard), known * self.page_size
        shard.running.append(sequence)
        self._add_piece(shard, sequence, computed[sequence.shard])
        return True

    def _promised(self, shard: Shard) -> int:
        """Pages that those running are expected to need beyond those that they have."""
        promised = 0
        for one in shard.running:
            assert one.lease is not None
            end = one.length + int(self._expected * one.room)
            promised += max(0, self._pages(end) - len(one.lease.nodes) - len(one.lease.own))
        return promised


def _computes_prompt(sequence: Sequence) -> bool:
    return sequence.lease is not None and sequence.stored < sequence.prompt
