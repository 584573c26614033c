"""When a run saves: by steps, by the clock, when it is told to, and when an evaluation is among the best."""

import pytest

from gshardx.checkpoint.store import SaveFailed
from gshardx.config import CheckpointConfig
from gshardx.errors import BadInput
from gshardx.train import saver
from gshardx.train.evaluate import BITS_PER_BYTE
from gshardx.train.goodput import Goodput
from gshardx.train.saver import Saver, Wish


class Store:
    """Notes what it is asked to save; a step in ``broken`` fails, at once or behind one's back."""

    def __init__(self, broken=(), later=()):
        self.saved, self.forced, self.scores, self.broken, self.later, self.failed = [], [], [], broken, later, None

    def is_best(self, score):
        return all(score < other for other in self.scores)

    def check(self):
        failed, self.failed = self.failed, None
        if failed is not None:
            raise SaveFailed(f"{failed} could not be saved", "mend that")

    def is_due(self, step):
        return step % 10 == 0

    def save(self, step, items, *, score):
        if step in self.broken:
            raise SaveFailed(f"{step} could not be saved", "mend that")
        self.failed = step if step in self.later else None
        self.saved.append(step)
        self.scores += [score] if score is not None else []
        return True


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(saver, "items_of", lambda state, rows: {})

    def made(store, **config):
        said = []
        return Saver(CheckpointConfig(every=10, **config), store, Goodput(None), said.append), said

    return made


def run(one, steps, scores=None, wish=None):
    for step in steps:
        found, last = (scores or {}).get(step, {}), step == steps[-1]
        if one.wants(step, found, (wish or {}).get(step, Wish()), last=last):
            one.save(step, None, None, found, last=last)
        else:
            one.check()


def test_the_last_step_and_wishes_are_saved_beside_those_that_are_due(make):
    store = Store()
    run(make(store)[0], range(1, 26), wish={7: Wish.of([], True), 13: Wish.of([15], False)})
    assert store.saved == [7, 10, 13, 20, 25]


def test_an_evaluation_that_is_the_best_so_far_is_saved(make):
    store = Store()
    scores = {step: {BITS_PER_BYTE: bits} for step, bits in ((2, 3), (4, 4), (6, 2), (8, 2))}
    run(make(store)[0], range(1, 10), scores=scores)
    assert store.saved == [2, 6, 9]
    assert store.scores == [3, 2]


def test_the_clock_asks_for_a_save_once_the_minutes_are_over(make, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    one, _ = make(Store(), every_minutes=2)
    due = []
    for step in range(1, 8):
        now[0] += 50.0
        due.append(one.due)
        if one.wants(step, {}, Wish.of([], one.due), last=False):
            one.save(step, None, None, {}, last=False)
    assert due == [False, False, True, False, False, True, False]
    assert not make(Store())[0].due


@pytest.mark.parametrize("store", [Store(broken=[10]), Store(later=[10])], ids=["at once", "behind one's back"])
def test_a_failure_ends_the_run_or_is_said_and_the_next_is_tried(make, store):
    stop, _ = make(store)
    with pytest.raises(BadInput, match="10 could not be saved; mend that"):
        run(stop, range(1, 30))
    store.failed = None
    go_on, said = make(store, on_error="continue")
    run(go_on, range(1, 26))
    assert store.saved[-2:] == [20, 25]
    assert said == ["10 could not be saved; training goes on (checkpoint.on_error = continue)"]


def test_the_last_save_must_succeed(make):
    one, _ = make(Store(broken=[25]), on_error="continue")
    with pytest.raises(BadInput, match="25 could not be saved"):
        run(one, range(1, 26))


def test_wishes_are_numbers_of_which_the_largest_counts():
    assert [Wish.of([], False), Wish.of([], True), Wish.of([15], False), Wish.of([15, 2], True)] == [0, 1, 30, 31]
    assert Wish(max(Wish.of([], True), Wish.of([2], False))).signal == 2
    assert Wish(1).signal == 0
