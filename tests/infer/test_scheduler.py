"""The scheduler alone, with an imagined device, under random operations."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gshardx.infer.scheduler import AGEING, NeedsResults, Scheduler, Sequence

SIZE, BUDGET, SLOTS, SCORES = 2, 6, 3, 4


def sequence(prompt, new, priority=0, family=None, after=None):
    tokens = np.zeros(len(prompt) + new, np.int32)
    tokens[: len(prompt)] = prompt
    return Sequence(tokens, len(prompt), family, priority, known=len(prompt), after=after)


class Device:
    """Holds a plan to what it promised, and draws token 1 whenever asked."""

    def __init__(self, scheduler):
        self.scheduler, self.flights, self.finished = scheduler, [], []

    def call(self, steps=4, drafts=None):
        """Plan and start a call; read results first where that is needed."""
        while True:
            try:
                plan = self.scheduler.plan(steps, drafts)
                break
            except NeedsResults:
                self.read()
        self.check(plan)
        drawn = [
            (one.sequence, min(plan.steps, one.sequence.room) if one.draws else 0)
            for segments in plan.segments
            for one in segments
        ]
        self.scheduler.commit(plan)
        if drawn:
            self.flights.append(drawn)
        return plan

    def check(self, plan):
        for shard, segments in zip(self.scheduler.shards, plan.segments, strict=True):
            assert sum(one.length for one in segments) <= BUDGET
            assert len({one.sequence for one in segments}) == len(segments) <= SLOTS
            assert plan.steps == 1 or all(one.length == 1 and one.draws for one in segments)
            assert sum(one.scored for one in segments) <= SCORES
            guessing = [one.drafts for one in segments if one.drafts]
            assert sum(guessing) <= (BUDGET - len(guessing)) / 2, "guesses leave no room to let others in"
            for one in segments:
                assert one.sequence in shard.running
                assert one.start == one.sequence.stored
                assert one.draws == (one.start + one.length - one.drafts == one.sequence.length)
                assert one.drafts <= max(0, one.sequence.room - 1)
                self.check_scores(one)
                stored = one.start + one.length + (min(plan.steps, one.sequence.room) - 1 if one.draws else 0)
                assert len(one.sequence.lease.pages) * SIZE >= stored, "no page to write to"

    def check_scores(self, one):
        """Each token of the prompt after the first once, in order, and all before the first draw."""
        sequence = one.sequence
        if one.scored:
            assert one.start + one.length + (not one.draws) - one.scored == sequence.scored
        if sequence.scored <= sequence.prompt:
            assert sequence.scored + one.scored >= min(one.start + one.length + 1, sequence.prompt)

    def read(self):
        if not self.flights:
            return
        for one, count in self.flights.pop(0):
            if one in self.finished:
                continue
            one.tokens[one.known : one.known + count] = 1
            one.known, one.pending = one.known + count, one.pending - count
            if one.known == len(one.tokens):
                self.end(one)

    def end(self, one):
        self.finished.append(one)
        self.scheduler.finish(one)


class Requests(RuleBasedStateMachine):
    @initialize(shards=st.integers(1, 2), pages=st.integers(9, 14))
    def start(self, shards, pages):
        self.scheduler = Scheduler(
            shards=shards, slots=SLOTS, pages=pages, page_size=SIZE, budget=BUDGET, scores=SCORES
        )
        self.device, self.all = Device(self.scheduler), []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), new=st.integers(1, 7),
          priority=st.integers(0, 2), family=st.integers(0, 1), choices=st.integers(1, 2),
          scored=st.booleans())  # fmt: skip
    def arrives(self, prompt, new, priority, family, choices, scored):
        first = None
        for _ in range(choices):
            one = sequence(prompt, new, priority, family, after=first)
            if scored and first is None:
                one.scored = 1
            first = first or one
            self.scheduler.add(one)
            self.all.append(one)

    @rule(steps=st.integers(1, 4))
    def computes(self, steps):
        self.device.call(steps)

    @rule(guesses=st.integers(1, 3), right=st.integers(0, 3))
    def guesses(self, guesses, right):
        """Results are read before and after, as an engine does that guesses."""
        while self.device.flights:
            self.device.read()
        rows = [one for one in self.scheduler.running if one.todo == 1]
        plan = self.device.call(1, dict.fromkeys(rows, guesses))
        self.device.read()
        for one in (one for segments in plan.segments for one in segments if one.drafts):
            if one.sequence not in self.device.finished:
                accepted = min(right, one.drafts)
                one.sequence.tokens[one.sequence.known : one.sequence.known + accepted] = 1
                one.sequence.known += accepted
                one.sequence.stored += accepted
                if one.sequence.known == len(one.sequence.tokens):
                    self.device.end(one.sequence)

    @rule()
    def reads(self):
        self.device.read()

    @rule(which=st.integers(0, 30))
    def is_cancelled(self, which):
        open_ = [one for one in self.all if one not in self.device.finished]
        if open_:
            self.device.end(open_[which % len(open_)])

    @invariant()
    def everything_is_in_one_place(self):
        for shard in self.scheduler.shards:
            own = [page for one in shard.running for page in one.lease.own]
            assert len(own) == len(set(own))
            assert 0 not in own
            assert sorted([*shard.slots, *(one.slot for one in shard.running)]) == list(range(SLOTS))
            pool = shard.pool
            assert pool.free + pool.evictable + pool.held == pool.count - 1
        for one in self.all:
            places = (one in self.device.finished) + (one in self.scheduler.waiting) + (one.lease is not None)
            assert places == 1
            assert one.stored <= one.length <= len(one.tokens)

    def teardown(self):
        for _ in range(40 * len(self.all) if self.all else 0):
            if len(self.device.finished) == len(self.all):
                break
            self.device.call()
            self.device.read()
        assert len(self.device.finished) == len(self.all), "somebody starves"
        assert all(shard.pool.held == 0 for shard in self.scheduler.shards)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)  # 10,000 operations


@pytest.fixture
def scheduler():
    return Scheduler(shards=1, slots=SLOTS, pages=40, page_size=SIZE, budget=BUDGET, scores=SCORES)


def test_who_writes_goes_on_and_prompts_take_what_is_left(scheduler):
    device, (a, b) = Device(scheduler), (sequence([1], 9), sequence([2] * 9, 1))
    scheduler.add(a)
    device.call()
    scheduler.add(b)
    pieces = [[(one.sequence is a, one.length) for one in device.call().segments[0]] for _ in range(2)]
    assert pieces == [[(True, 1), (False, 5)], [(True, 1), (False, 4)]]


def test_where_all_write_a_call_draws_several_tokens(scheduler):
    device = Device(scheduler)
    scheduler.add(sequence([1, 1], 9))
    assert [device.call(steps=4).steps for _ in range(3)] == [1, 4, 4]


def test_lower_priorities_go_first_and_equals_in_turn(scheduler):
    device = Device(scheduler)
    ones = [sequence([1] * 6, 1, priority) for priority in (2, 0, 1, 0)]
    for one in ones:
        scheduler.add(one)
    order = []
    for _ in range(8):
        order += [ones.index(segment.sequence) for segment in device.call().segments[0] if segment.draws]
        device.read()
    assert order == [1, 3, 2, 0]


def test_who_waits_long_overtakes_those_of_higher_priority(scheduler):
    low = sequence([1] * 6, 1, priority=1)
    scheduler.add(low)
    device = Device(scheduler)
    calls = 0
    while low in scheduler.waiting or not calls:
        scheduler.add(sequence([1000 + calls] * 6, 1, priority=0))  # another each time: no prefix is shared
        device.call()
        device.read()
        calls += 1
    assert AGEING <= calls <= AGEING + 2


def test_the_last_in_order_gives_up_its_pages():
    scheduler = Scheduler(shards=1, slots=SLOTS, pages=7, page_size=SIZE, budget=BUDGET, scores=SCORES)
    device, (a, b) = Device(scheduler), (sequence([1], 8), sequence([2], 8))
    scheduler._expected = 0.0
    for one in (a, b):
        scheduler.add(one)
    while scheduler.retractions == 0:
        scheduler._expected = 0.0
        device.call(steps=1)
        device.read()
    assert a.lease is not None
    assert b in scheduler.waiting
    assert (b.stored, b.known > 1) == (0, True)
    while len(device.finished) < 2:
        device.call(steps=1)
        device.read()
    assert device.finished == [a, b]


def test_a_sequence_that_can_never_fit_is_known_before(scheduler):
    assert scheduler.fits(39 * SIZE)
    assert not scheduler.fits(39 * SIZE + 1)
