"""Routing traces come back as they were written, in the smallest integers."""

import json

import jax
import numpy as np
import pytest

from gshardx.layers import Packed
from gshardx.models.build import Variables
from gshardx.train.trace import read_trace, write_trace
from tests.train.processes import finish, start_training, write_inputs


def test_a_trace_is_small_and_comes_back(tmp_path):
    draw = np.random.default_rng(0)
    rows = {"tokens": draw.integers(0, 2048, (4, 32)), "segments": np.repeat([[1] * 20 + [0] * 12], 4, axis=0)}
    experts = draw.integers(0, 8, (3, 4, 32, 2))
    path = write_trace(tmp_path / "routing", 7, rows, experts)
    assert path == tmp_path / "routing" / "7.npz"
    trace = read_trace(path)
    np.testing.assert_array_equal(trace.tokens, rows["tokens"])
    np.testing.assert_array_equal(trace.segments, rows["segments"])
    np.testing.assert_array_equal(trace.experts, experts)
    assert (trace.tokens.dtype, trace.experts.dtype) == (np.uint16, np.uint8)
    assert path.stat().st_size < experts.size + 2 * rows["tokens"].size + 1000  # the archive's own headers
    wide = write_trace(tmp_path / "routing", 8, rows, experts + 300)
    assert read_trace(wide).experts.dtype == np.uint16


@pytest.mark.slow
def test_a_run_with_a_stateful_router_traces_resumes_and_generates(tmp_path):
    """sigmoid_bias, adaptive weight, traces: the state moves, is saved, and is what inference reads."""
    from gshardx.infer.load import load_run
    from gshardx.sharding import MeshConfig

    write_inputs(tmp_path)
    options = [
        *("--model.moe.router", "sigmoid_bias", "--model.moe.router_options", "{rate: 0.01}"),
        *("--model.moe.adaptive_balance", "true", "--train.trace_every", "3", "--train.steps"),
    ]
    finish(start_training(tmp_path, tmp_path / "whole", *options, "8"))
    finish(start_training(tmp_path, tmp_path / "parts", *options, "4"))
    out, _ = finish(start_training(tmp_path, tmp_path / "parts", *options, "8"))
    assert "resuming" in out
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [sorted(path.stem for path in (tmp_path / name / "routing").iterdir()) for name in ("whole", "parts")] == [
        ["3", "6"]
    ] * 2
    assert lines[0][3]["learning/loss"] == lines[1][3]["learning/loss"]
    weights = [line["moe/layer_0/balance_weight"] for line in lines[0]]
    assert weights[0] != weights[-1], "the weight follows the drop rate"

    run = load_run(tmp_path / "whole", MeshConfig())
    bias = np.asarray(run.variables.router.bias)
    assert bias.shape == (1, 4)
    steps = np.round(bias / 0.01, 4)
    assert np.abs(steps).max() >= 1
    np.testing.assert_array_equal(steps, np.round(steps))
    assert np.asarray(run.variables.router.load).max() == 0

    trace = read_trace(tmp_path / "whole" / "routing" / "3.npz")
    assert trace.experts.shape == (1, 8, 32, 2)
    model = run.blueprint.bind(run.variables.params)
    tokens, ones = jax.numpy.asarray(trace.tokens[:1].astype(np.int32)), jax.numpy.ones((1, 32), np.int32)
    positions = jax.numpy.arange(32)[None]

    def experts(variables):
        return model.hidden(tokens, positions, ones > 0, Packed.of(ones), None, variables.router)[2].experts

    shifted = run.variables.router._replace(bias=run.variables.router.bias.at[:, 0].add(10.0))
    assert (np.asarray(experts(Variables(run.variables.params, shifted)))[..., 0] == 0).all()
    assert not (np.asarray(experts(run.variables))[..., 0] == 0).all()
