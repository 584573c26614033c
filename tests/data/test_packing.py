"""Packings, held to the textbook's loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.data.packing import best_fit, first_fit

capacities = st.integers(1, 20)


def loop(sizes, capacity, choose):
    """One piece after the other into the row that ``choose`` takes of those with room."""
    rooms, rows = [], []
    for size in sizes:
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        if not fitting:
            rooms.append(capacity)
        row = choose(fitting, rooms) if fitting else len(rooms) - 1
        rooms[row] -= size
        rows.append(row)
    return rows, rooms


@settings(max_examples=200, deadline=None)
@given(capacity=capacities, data=st.data())
def test_first_fit_takes_the_first_row_with_room(capacity, data):
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    row, rows = first_fit(np.asarray(sizes), capacity)
    expected, rooms = loop(sizes, capacity, lambda fitting, _: fitting[0])
    assert row.tolist() == expected
    assert rows == len(rooms)


@settings(max_examples=200, deadline=None)
@given(capacity=capacities, data=st.data())
def test_best_fit_takes_the_longest_first_into_the_fullest_row_with_room(capacity, data):
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    row, rows = best_fit(np.asarray(sizes), capacity)
    _, rooms = loop(sorted(sizes, reverse=True), capacity, lambda fitting, left: min(fitting, key=left.__getitem__))
    filled = np.bincount(row, weights=sizes)
    assert rows == len(rooms)
    assert sorted(capacity - filled) == sorted(rooms)  # which of two equal rows is taken may differ


@pytest.mark.parametrize("pack", [first_fit, best_fit])
def test_random_lengths_leave_little_padding(pack):
    sizes = np.random.RandomState(0).randint(1, 257, 1024)
    _, rows = pack(sizes, 256)
    assert sizes.sum() / (rows * 256) > (0.98 if pack is best_fit else 0.93)
