"""Learning rates step by step against a NumPy twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.config import OptimizerConfig
from gshardx.train.schedules import SCHEDULES, schedule
from tests.oracles.optimizers import rate


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 200), warmup=st.integers(1, 60), final=st.sampled_from([0.0, 0.1, 1.0]), data=st.data())
def test_a_schedule_is_its_twin_at_every_step_and_beyond(name, steps, warmup, final, data):
    start = data.draw(st.none() | st.integers(warmup, 300)) if name == "inverse_sqrt" else None
    fraction = data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    config = OptimizerConfig(
        schedule=name, learning_rate=0.5, warmup_steps=warmup, final_fraction=final, decay_start=start,
        decay_fraction=fraction,
    )  # fmt: skip
    at = np.arange(220)  # of one length, since JAX compiles for each
    expected = [rate(name, t, steps, 0.5, warmup, final=final, start=start, fraction=fraction) for t in at]
    np.testing.assert_allclose(schedule(config, steps)(at), expected, rtol=1e-5, atol=1e-7)


def test_the_cosine_rises_then_falls_to_its_share():
    found = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1), 100)
    assert [float(found(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_the_inverse_root_is_gshard_s():
    """1 / sqrt(max(step, 10,000)): flat without a warm-up, and the same for any number of steps."""
    config = OptimizerConfig(schedule="inverse_sqrt", learning_rate=0.01, warmup_steps=0, decay_start=10_000)
    steps = np.array([0, 1, 9_999, 10_000, 40_000, 250_000])
    for length in (1, 1_000_000):
        np.testing.assert_allclose(schedule(config, length)(steps), 1 / np.sqrt(np.maximum(steps, 10_000)), rtol=1e-6)


def test_wsd_is_flat_until_the_last_tenth():
    found = schedule(OptimizerConfig(schedule="wsd", learning_rate=1.0, warmup_steps=10, final_fraction=0.0), 100)
    assert [float(found(step)) for step in (5, 10, 50, 90, 95, 100)] == pytest.approx([0.5, 1, 1, 1, 0.5, 0])
