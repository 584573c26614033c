"""What a step's line tells: the names people look for, and only useful FLOPs."""

import numpy as np
import pytest

from gshardx.layers.routing import RouterStats
from gshardx.train.metrics import step_scalars
from gshardx.train.step import StepMetrics


def scalars(drop=(0.0, 0.0), load=(1.0, 3.0), tokens=100, seconds=2.0, flops=(10.0, 15.0), peak=1e4):
    """Two layers of 4 experts, top-2."""
    choices = np.full((2, 2), float(tokens))
    zeros, parts = np.zeros(2), np.zeros((2, 8))
    loads = np.float32([[load[layer], *[(4 - load[layer]) / 3] * 3] for layer in range(2)]) * 2 * tokens / 4
    stats = RouterStats(
        tokens=np.full(2, float(tokens)),
        choices=choices,
        dropped=choices * np.float32(drop)[:, None],
        load=loads,
        room=np.full(2, 2.5 * tokens),
        entropy=zeros,
        z=zeros,
        largest_logit=np.float32([3.0, 5.0]),
        choices_by_position=parts,
        dropped_by_position=parts,
    )
    aux = {"balance": np.float32([1.0, 1.2]), "z": np.float32([2.0, 4.0])}
    weight = np.float32([0.01, 0.03])
    step = StepMetrics(
        np.float32(2.5), np.float32(0.5), np.int32(tokens), aux, stats, weight, np.int32(0), np.int32(0), None
    )
    return step_scalars(step, 1e-3, seconds, flops, peak)


def test_a_step_has_the_names_that_people_look_for():
    assert {
        "learning/loss",
        "learning/aux_loss",
        "learning/grad_norm",
        "learning/current_learning_rate",
        "perf/step_seconds",
        "perf/tokens_per_second",
        "perf/mfu",
        "moe/drop_fraction",
        "moe/load_max_over_mean",
        "moe/layer_0/drop_fraction",
        "moe/layer_1/load_max_over_mean",
    } <= set(scalars())


def test_scalars_are_the_steps_values_and_means_over_layers():
    found = scalars(drop=(0.1, 0.3))
    expected = {
        "learning/loss": 2.5,
        "learning/grad_norm": 0.5,
        "learning/aux_loss": 1.1,
        "learning/current_learning_rate": 1e-3,
        "perf/step_seconds": 2.0,
        "perf/tokens_per_second": 50.0,
        "moe/drop_fraction": 0.2,
        "moe/load_max_over_mean": 2.0,
        "moe/layer_0/drop_fraction": 0.1,
        "moe/layer_1/drop_fraction": 0.3,
        "moe/layer_1/load_max_over_mean": 3.0,
        "learning/aux_z_loss": 3.0,
        "moe/balance_weight": 0.02,
        "moe/largest_logit": 5.0,
        "moe/layer_0/largest_logit": 3.0,
        "moe/layer_0/capacity_used": 0.72,
        "moe/layer_1/max_violation": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {type(value) for value in found.values()} == {float}


def test_dropped_choices_are_no_useful_flops():
    assert scalars()["perf/mfu"] == pytest.approx(3 * 100 * (10 + 30) / 2 / 1e4)
    assert scalars(drop=(0.5, 0.5))["perf/mfu"] == pytest.approx(3 * 100 * (10 + 15) / 2 / 1e4)
    assert scalars(drop=(1.0, 1.0))["perf/mfu"] == pytest.approx(3 * 100 * 10 / 2 / 1e4)
    assert scalars()["perf/useful_tflops_per_second"] == pytest.approx(6000 / 1e12)
