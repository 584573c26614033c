"""The order of examples: a permutation an epoch, shares kept from the start, nothing that depends on who asks."""

import itertools

import numpy as np
import pytest
from grain._src.python.dataset.transformations.mix import SelectionWithProportionsMap
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.data import order
from gshardx.data.order import Order, temperature_weights


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 16)


def blocks_of(made, epoch=0):
    return list(itertools.takewhile(lambda block: block is not None, (made.block(epoch, n) for n in itertools.count())))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 100), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_is_each_example_once_in_an_order_of_its_own(count, seed, epoch):
    made = Order([count], [1.0], seed)
    numbers = np.concatenate([block.number for block in blocks_of(made, epoch)])
    assert sorted(numbers.tolist()) == list(range(count))
    following = np.concatenate([block.number for block in blocks_of(made, epoch + 1)])
    assert count < 10 or numbers.tolist() != following.tolist()
    again = Order([count], [1.0], seed).block(epoch, len(blocks_of(made, epoch)) - 1)  # asked for out of order
    np.testing.assert_array_equal(again.number, blocks_of(made, epoch)[-1].number)


def test_another_seed_is_another_order():
    first, second = (Order([50], [1.0], seed).block(0, 0).number.tolist() for seed in (0, 1))
    assert first != second


weights = st.lists(st.floats(0.01, 100), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights=weights, start=st.integers(0, 10**9))
def test_a_mixture_is_grains(weights, start):
    """Ours is for many places at once; Grain's for one."""
    proportions = order._whole_numbers(weights)
    grains = SelectionWithProportionsMap([range(10**6)] * len(weights), None)
    grains._proportions = tuple(proportions)
    source, index = order._shares(np.arange(start, start + 40), proportions)
    assert [(int(a), int(b)) for a, b in zip(source, index, strict=True)] == [grains[start + i] for i in range(40)]


@settings(max_examples=20, deadline=None)
@given(weights=weights)
def test_any_beginning_of_a_mixture_is_close_to_every_share(weights):
    proportions = order._whole_numbers(weights)
    source, _ = order._shares(np.arange(300), proportions)
    so_far = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 301)[:, None] * np.asarray(proportions) / sum(proportions)
    assert np.abs(so_far - wanted).max() < len(weights)


def test_a_source_of_a_mixture_comes_whole_before_it_comes_again():
    made = Order([5, 30], [1.0, 1.0], 3)
    chosen = [made.block(0, n) for n in range(10)]
    source, number = (np.concatenate(arrays) for arrays in zip(*chosen, strict=True))
    small = number[source == 0].tolist()
    rounds = [small[i : i + 5] for i in range(0, len(small) - 4, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_temperature():
    assert temperature_weights([100, 300], [1.0, 1.0], None) == [0.5, 0.5]
    assert temperature_weights([100, 300], [1.0, 1.0], 1.0) == [0.25, 0.75]
    hot = temperature_weights([1, 32], [1.0, 1.0], 5.0)
    np.testing.assert_allclose(hot, [1 / 3, 2 / 3])
    np.testing.assert_allclose(temperature_weights([1, 32], [4.0, 1.0], 5.0), [2 / 3, 1 / 3])
