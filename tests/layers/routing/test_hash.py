"""Hash layers against loops, and what they promise."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, HashRouter
from gshardx.layers.routing.hash import balanced, hashed
from tests.layers.routing.cases import G, M, capacity_of, check
from tests.oracles import hash as oracle

COUNTS = [100, 3, 7, 7, 1, 0, 60, 22, 9, 5, 40]
SETTINGS = {
    "plain": ((12, 8, 1), Capacity(None), {}),
    "tight": ((13, 4, 1), Capacity(0.6), {"seed": 5}),
    "multiple": ((12, 6, 3), Capacity(0.8), {"seed": 2}),
    "balanced": ((12, 4, 1), Capacity(1.0), {"counts": COUNTS}),
}


@functools.cache
def compiled(name):
    (_, e, k), capacity, options = SETTINGS[name]
    router = HashRouter(M, e, k, capacity=capacity, **options)
    return jax.jit(lambda tokens, valid, rng, ids: router.reading(ids, None)(tokens, valid, rng))


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), words=st.sampled_from([1, 20, 100_000]), share=st.sampled_from([0.0, 0.6, 1.0]))
def test_equals_the_loops_in_every_setting(name, seed, words, share):
    (s, e, k), capacity, options = SETTINGS[name]
    draw = np.random.default_rng(seed)
    ids, valid = draw.integers(0, words, (G, s)).astype(np.int32), draw.random((G, s)) < share
    routing = compiled(name)(np.zeros((G, s, M), np.float32), valid, jax.random.key(0), ids)
    slots = capacity_of(capacity, s, e, k, training=True)
    check(routing, [oracle.route(ids[g], e, k, slots, valid[g], **options) for g in range(G)])


@pytest.mark.parametrize("seed", [0, 1])
def test_ids_spread_evenly_over_the_experts(seed):
    found = np.bincount(np.asarray(hashed(np.arange(64_000, dtype=np.int32), seed)) % 64, minlength=64)
    assert abs(found / 1000 - 1).max() < 0.12  # 4 deviations of a random function: 4 / sqrt(1000)


def test_functions_of_other_seeds_are_others():
    ids = np.arange(4000, dtype=np.int32)
    alike = (np.asarray(hashed(ids, 0)) % 8 == np.asarray(hashed(ids, 1)) % 8).mean()
    assert abs(alike - 1 / 8) < 0.03


def test_counts_even_the_experts_loads():
    """Zipf's law over 1000 words: the first word alone is 0.13 of the text, so 8 experts are no even share; 4 are."""
    counts = [int(1e6 / rank) for rank in range(1, 1001)]
    even = np.bincount(balanced(counts, 4), weights=counts, minlength=4)
    plain = np.bincount(np.asarray(hashed(np.arange(1000, dtype=np.int32), 0)) % 4, weights=counts, minlength=4)
    assert even.max() / even.mean() < 1.001
    assert plain.max() / plain.mean() > 1.05


@pytest.mark.parametrize(
    ("k", "options", "mend"), [(3, {}, "use a divisor"), (2, {"counts": COUNTS}, "use top_k 1")], ids=["k", "counts"]
)
def test_what_can_not_be_is_refused(k, options, mend):
    with pytest.raises(BadInput, match=mend):
        HashRouter(M, 8, k, **options)


def test_without_ids_it_says_what_is_missing():
    with pytest.raises(BadInput, match="give the layer its argument ids"):
        HashRouter(M, 8, 1)(np.zeros((1, 2, M), np.float32), np.ones((1, 2), bool), None)
