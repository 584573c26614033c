"""Batches made ahead, in a thread or in worker processes: the same ones, and the state of the one given last."""

import itertools
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from gshardx.data.blocks import Mixture
from gshardx.data.corpora import MemoryCorpus
from gshardx.data.pipeline import TrainingRows, training_rows
from gshardx.data.prefetch import Ahead
from gshardx.errors import BadInput


def blocks():
    draw = random.Random(0)
    documents = [np.arange(draw.randrange(2, 40)) for _ in range(2000)]
    return Mixture([MemoryCorpus(documents)], [np.zeros(2000, bool)], [1.0], 16, "first_fit", 3)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def expected():
    """The first batches and the state after each."""
    rows = training_rows(blocks(), 16, 4)
    return [(batch, rows.get_state()) for batch in itertools.islice(rows, 40)]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_thread_gives_the_same_batches_and_the_state_of_the_one_given_last(expected, count):
    ahead = Ahead(training_rows(blocks(), 16, 4), lambda batch: batch, count)
    for batch, state in expected:
        assert_equal(next(ahead), batch)
        assert ahead.get_state() == state
    for at in (0, 25, 10):  # and from any state, with batches made ahead or not
        ahead.set_state(expected[at][1])
        assert ahead.get_state() == expected[at][1]
        for batch, state in expected[at + 1 : at + 8]:
            assert_equal(next(ahead), batch)
            assert ahead.get_state() == state
    ahead.close()


def test_batches_are_placed_ahead_of_the_one_that_is_asked_for():
    placed = threading.Semaphore(0)

    def place(batch):
        placed.release()
        return batch

    ahead = Ahead(training_rows(blocks(), 16, 4), place, 3)
    next(ahead)
    for _ in range(4):
        assert placed.acquire(timeout=60)
    ahead.close()


def test_an_error_in_the_thread_is_raised_where_batches_are_asked_for():
    def place(batch):
        raise BadInput("no")

    ahead = Ahead(training_rows(blocks(), 16, 4), place, 2)
    with pytest.raises(BadInput, match="no"):
        next(ahead)
    ahead.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_batches_and_states(expected, workers):
    rows = training_rows(blocks(), 16, 4, workers=workers)
    for batch, state in expected[:20]:
        assert_equal(next(rows), batch)
        assert rows.get_state() == state
    rows.set_state(expected[10][1])
    for batch, state in expected[11:]:
        assert_equal(next(rows), batch)
        assert rows.get_state() == state
    rows.close()


ORPHANING = """
import os, signal, sys
import numpy as np
from gshardx.data.blocks import Mixture
from gshardx.data.corpora import MemoryCorpus
from gshardx.data.pipeline import training_rows

if __name__ == "__main__":
    blocks = Mixture([MemoryCorpus([np.arange(40)] * 9)], [np.zeros(9, bool)], [1.0], 16, "first_fit", 3)
    next(training_rows(blocks, 16, 4, workers=2))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(tmp_path):
    """Its pipes close only when the last of them has gone."""
    (tmp_path / "orphaning.py").write_text(ORPHANING)
    done = subprocess.run([sys.executable, "orphaning.py"], cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_s_error_is_raised_here():
    class Broken:
        def block(self, epoch, number):
            raise BadInput("this block is broken")

    rows: TrainingRows = training_rows(Broken(), 16, 4, workers=2)
    with pytest.raises(BadInput, match="this block is broken"):
        next(rows)
    rows.close()
