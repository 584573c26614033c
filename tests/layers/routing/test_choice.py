"""Capacity, the k best and slots against loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity
from gshardx.layers.routing.choice import assign_slots, best_groups, check_groups, sort_by_expert, take, top_k
from tests.oracles import choice as oracle

SEEDS = st.integers(0, 2**32 - 1)
best = jax.jit(top_k, static_argnums=1)
grouped = jax.jit(best_groups, static_argnums=(1, 2, 3))
number = jax.jit(assign_slots, static_argnums=2)


def coarse(seed, *shape):
    """Scores of few values, so that many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("capacity", "s", "e", "k", "training", "slots"),
    [
        (Capacity(1.0), 1024, 512, 2, True, 4),  # lingvo's comment: 2S/E = 4
        (Capacity(1.25), 8, 8, 2, True, 3),
        (Capacity(1.25, rounding="down"), 8, 8, 2, True, 2),
        (Capacity(1.25, rounding="four"), 8, 8, 2, True, 4),
        (Capacity(1.0, rounding="four"), 40, 8, 1, True, 8),
        (Capacity(1.0, rounding="four"), 39, 8, 1, True, 4),
        (Capacity(1.0, rounding="four", minimum=4), 16, 64, 2, True, 4),
        (Capacity(1.0, rounding="down"), 16, 64, 2, True, 1),
        (Capacity(1.0, minimum=4), 3, 64, 2, True, 3),
        (Capacity(9.0), 4, 2, 2, True, 4),
        (Capacity(None), 37, 8, 2, True, 37),
        (Capacity(1.25), 37, 8, 2, False, 37),
        (Capacity(1.25, evaluation=2.0), 32, 8, 1, True, 5),
        (Capacity(1.25, evaluation=2.0), 32, 8, 1, False, 8),
        (Capacity(None, evaluation=0.5), 32, 8, 1, False, 2),
        (Capacity(1.1), 100, 2, 1, True, 55),  # in floats 55.00000000000001
        (Capacity(1.2, rounding="down"), 100, 4, 3, True, 90),  # in floats 89.99999999999999
    ],
)
def test_capacity_follows_the_papers(capacity, s, e, k, training, slots):
    assert capacity.slots(s, e, k, training) == slots


@settings(max_examples=200, deadline=None)
@given(
    factor=st.sampled_from([0.01, 0.125, 0.29, 0.7, 1.0, 1.1, 1.2, 1.25, 1.4, 2.0, 3.3]),
    s=st.integers(1, 3000),
    e=st.integers(1, 600),
    k=st.integers(1, 8),
    rounding=st.sampled_from(["up", "down", "four"]),
    minimum=st.integers(1, 8),
)
def test_capacity_equals_exact_arithmetic(factor, s, e, k, rounding, minimum):
    expected = oracle.slots_per_expert(s, e, k, factor, rounding, minimum)
    assert Capacity(factor, None, rounding, minimum).slots(s, e, k, True) == expected
    assert Capacity(None, factor, rounding, minimum).slots(s, e, k, False) == expected


@pytest.mark.parametrize("k", [1, 3, 6])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_k_best_come_best_first_and_of_equals_the_lower(k, seed):
    scores = coarse(seed, 2, 5, 6)
    expected = [[oracle.best(list(row), k) for row in group] for group in scores]
    np.testing.assert_array_equal(best(scores, k), expected)


def test_the_k_best_accept_minus_infinity_and_very_large_scores():
    scores = np.float32([[[-np.inf, 3e38, -3e38, -np.inf, 0.0]]])
    np.testing.assert_array_equal(best(scores, 3), [[[1, 4, 2]]])


def test_no_expert_is_chosen_twice_whatever_is_nan():
    scores = jnp.asarray([[[jnp.nan] * 4, [1.0, jnp.nan, 2.0, -jnp.inf], [0.5, -1e38, 3.0, 1.0]]])
    assert top_k(scores, 3).tolist() == [[[0, 1, 2], [2, 0, 1], [2, 3, 0]]]


def test_gradient_of_the_values_taken_stays_at_the_chosen():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
    experts = np.asarray(best(scores, 3))
    np.testing.assert_array_equal(take(scores, experts), np.take_along_axis(np.asarray(scores), experts, axis=-1))
    factor = np.float32([1.0, 2.0, 4.0])
    actual = jax.jit(jax.grad(lambda x: jnp.sum(take(x, top_k(x, 3)) * factor)))(scores)
    expected = np.zeros((2, 5, 6))
    np.put_along_axis(expected, experts, np.broadcast_to(factor, experts.shape), axis=-1)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("groups", "kept", "best_of"), [(4, 2, 1), (4, 2, 2), (2, 1, 2), (8, 3, 2), (1, 1, 2)])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_best_groups_are_those_with_the_best_sums(groups, kept, best_of, seed):
    scores = coarse(seed, 2, 5, 8)
    open_to = np.asarray(grouped(scores, groups, kept, best_of))
    for group, expected in zip(open_to.reshape(10, 8), scores.reshape(10, 8), strict=True):
        chosen = oracle.best(oracle.group_scores(list(expected), groups, best_of), kept)
        assert set(np.flatnonzero(group) * groups // 8) == set(chosen)
        assert group.sum() == kept * 8 // groups


@pytest.mark.parametrize(
    ("num_experts", "k", "groups", "kept", "complaint"),
    [
        (8, 2, 3, 1, "groups = 3"),
        (8, 2, 0, 1, "groups = 0"),
        (8, 3, 4, 1, "groups_kept = 1"),
        (8, 2, 4, 5, "groups_kept = 5"),
        (8, 9, 4, 4, "groups_kept = 4"),
    ],
)
def test_groups_that_cannot_hold_the_choices_are_refused(num_experts, k, groups, kept, complaint):
    with pytest.raises(BadInput, match=complaint):
        check_groups(num_experts, k, groups, kept)


def test_groups_that_just_hold_the_choices_are_accepted():
    for num_experts, k, groups, kept in [(8, 2, 4, 1), (8, 3, 4, 2), (8, 8, 4, 4), (256, 8, 8, 4), (3, 3, 1, 1)]:
        check_groups(num_experts, k, groups, kept)


@pytest.mark.parametrize("num_experts", [2**15 - 2, 2**15], ids=["one integer", "too large for one integer"])
def test_the_sort_by_expert_is_stable_and_puts_unwanted_choices_last(num_experts):
    n = 2**16
    experts = np.random.default_rng(0).integers(0, num_experts + 1, n).astype(np.int32)
    experts[:100] = 7
    order, counts = jax.jit(partial(sort_by_expert, num_experts=num_experts))(experts)
    np.testing.assert_array_equal(order, np.argsort(experts, kind="stable"))
    np.testing.assert_array_equal(counts, np.bincount(experts, minlength=num_experts + 1)[:num_experts])


def test_ids_beyond_the_experts_count_nowhere():
    order, counts = sort_by_expert(jnp.asarray([9, 0, 2, 3, 0, 5]), 3)
    np.testing.assert_array_equal(counts, [2, 0, 1])
    np.testing.assert_array_equal(order[:3], [1, 4, 2])


@pytest.mark.parametrize(("s", "e", "k"), [(1, 3, 2), (17, 3, 3), (17, 6, 2)])
@pytest.mark.parametrize("by_priority", [False, True])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, share=st.sampled_from([0.0, 0.6, 1.0]), crowded=st.booleans())
def test_slots_equal_the_papers_counters(s, e, k, by_priority, seed, share, crowded):
    draw = np.random.default_rng(seed)
    experts = np.argsort(draw.random((2, s, e)) if not crowded else np.tile(draw.random(e), (2, s, 1)), -1)[..., :k]
    wanted = draw.random((2, s, k)) < share
    priority = coarse(seed, 2, s) if by_priority else None
    slots, counts = number(experts.astype(np.int32), wanted, e, priority)
    for g in range(2):
        order = sorted(range(s), key=lambda token: -priority[g, token]) if by_priority else range(s)
        expected, count = oracle.number(experts[g], wanted[g], e, order)
        np.testing.assert_array_equal(np.asarray(slots[g])[wanted[g]], expected[wanted[g]])
        np.testing.assert_array_equal(counts[g], count)
