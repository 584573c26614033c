"""The page pool against a model that recounts everything, under random operations."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gshardx.infer.pages import PagePool

SIZE = 2


def tokens(*values):
    return np.asarray(values, np.int32)


def test_a_prefix_is_shared_in_whole_pages_but_for_the_last_token():
    pool = PagePool(count=9, size=SIZE)
    first = pool.open("model", tokens(1, 2, 3, 4, 5))
    assert first.pages == []
    assert pool.grow(first, 5)
    assert len(first.pages) == 3
    pool.keep(first, tokens(1, 2, 3, 4, 5))
    again = pool.open("model", tokens(1, 2, 3, 4))
    assert again.pages == first.pages[:1], "the last token of a prompt is computed, so its page is not shared"
    longer = pool.open("model", tokens(1, 2, 3, 4, 9, 9, 9))
    assert longer.pages == first.pages[:2]
    assert pool.open("model", tokens(7, 2, 3, 4, 5)).pages == []
    assert pool.open("another adapter", tokens(1, 2, 3, 4, 5)).pages == []


def test_pages_that_nobody_holds_stay_and_go_least_recently_used_first():
    pool = PagePool(count=5, size=SIZE)
    for start in (10, 20):
        lease = pool.open("model", tokens(start, 1, 2))
        assert pool.grow(lease, 2)
        pool.keep(lease, tokens(start, 1))
        pool.close(lease)
    pool.close(pool.open("model", tokens(10, 1, 2)))  # used again
    assert (pool.free, pool.evictable, pool.held) == (2, 2, 0)
    big = pool.open("model", tokens(5))
    assert pool.grow(big, 3 * SIZE)
    assert pool.evictable == 1
    assert pool.open("model", tokens(20, 1, 2)).pages == []
    assert len(pool.open("model", tokens(10, 1, 2)).pages) == 1


def test_what_does_not_fit_takes_nothing():
    pool = PagePool(count=3, size=SIZE)
    lease = pool.open("model", tokens(1))
    assert not pool.grow(lease, 3 * SIZE)
    assert (pool.free, lease.pages) == (2, [])


def test_two_that_computed_the_same_page_end_with_one():
    pool = PagePool(count=9, size=SIZE)
    one, two = pool.open("model", tokens(1, 2, 3)), pool.open("model", tokens(1, 2, 3))
    assert pool.grow(one, 3)
    assert pool.grow(two, 3)
    pool.keep(one, tokens(1, 2))
    pool.keep(two, tokens(1, 2))
    assert one.pages[0] == two.pages[0]
    assert one.pages[1] != two.pages[1]
    assert pool.held == 3


class Pool(RuleBasedStateMachine):
    """Few tokens and few pages, so that prefixes meet and room runs out."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(count=12, size=SIZE)
        self.open = {}  # lease id -> (lease, its sequence)
        self.content = {}  # page -> the tokens up to its end that somebody stored there

    @rule(target=leases, family=st.integers(0, 1), sequence=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def opens(self, family, sequence):
        lease = self.pool.open(family, tokens(*sequence))
        assert len(lease.pages) * SIZE < len(sequence)
        for place, page in enumerate(lease.pages):
            assert self.content[page] == (family, *sequence[: (place + 1) * SIZE]), "another prefix's page"
        self.open[id(lease)] = (lease, family, sequence)
        return lease

    @rule(lease=leases, extra=st.integers(1, 9))
    def grows(self, lease, extra):
        before, (_, family, sequence) = lease.pages, self.open[id(lease)]
        wanted = min(len(sequence), len(before) * SIZE + extra)
        room = self.pool.free + self.pool.evictable
        grown = self.pool.grow(lease, wanted)
        assert grown == (-(-wanted // SIZE) - len(before) <= room)
        assert lease.pages[: len(before)] == before
        if grown:
            for place, page in enumerate(lease.pages):
                if page not in before:
                    self.content[page] = (family, *sequence[: (place + 1) * SIZE])

    @rule(lease=leases)
    def keeps(self, lease):
        _, _, sequence = self.open[id(lease)]
        stored = len(lease.pages) * SIZE
        self.pool.keep(lease, tokens(*sequence[:stored]))
        assert len(lease.nodes) == min(len(sequence), stored) // SIZE

    @rule(lease=consumes(leases))
    def closes(self, lease):
        del self.open[id(lease)]
        self.pool.close(lease)
        assert lease.pages == []

    @invariant()
    def every_page_is_accounted_for_once(self):
        in_tree, stack = [], list(self.pool._roots.values())
        while stack:
            node = stack.pop()
            in_tree += [node] if node.parent else []
            stack += node.children.values()
        own = [page for lease, *_ in self.open.values() for page in lease.own]
        everywhere = [*self.pool._free, *own, *(node.page for node in in_tree)]
        assert sorted(everywhere) == list(range(1, self.pool.count))
        for node in in_tree:
            assert node.holders == sum(node in lease.nodes for lease, *_ in self.open.values())
        assert self.pool.evictable == sum(node.holders == 0 for node in in_tree)
        assert self.pool.free + self.pool.evictable + self.pool.held == self.pool.count - 1

    def teardown(self):
        for lease, *_ in list(self.open.values()):
            self.pool.close(lease)
        assert self.pool.held == 0
        assert self.pool.grow(self.pool.open("all", tokens(0)), (self.pool.count - 1) * SIZE), "all can be evicted"


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)  # 10,000 operations
