"""The loop in this process: what it compiles, and what it measures."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.sharding import MeshConfig
from gshardx.train import loop
from gshardx.train.flops import forward_flops_per_token
from gshardx.train.job import Job
from gshardx.train.meter import Meter
from gshardx.train.run_dir import RunDir
from gshardx.train.state import init_state


def test_nothing_is_compiled_after_the_second_step(config, tmp_path, monkeypatch):
    step, compiled = [0], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(step[0])

    put = Meter.put

    def counted(self, number, *more):
        step[0] = number
        put(self, number, *more)

    monkeypatch.setattr(Meter, "put", counted)
    monkeypatch.setattr(loop, "report", lambda *_: step.__setitem__(0, -1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert loop.train(config, RunDir(tmp_path / "run"), "command") == 0
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled.count(0) >= 2, "the listener must have seen the step being compiled"
    assert [number for number in compiled if number >= 2] == []


@pytest.mark.slow
def test_a_start_is_the_same_on_every_mesh(config):
    states = []
    for mesh in (MeshConfig(), MeshConfig(expert=4, tensor=1, data=2), MeshConfig(fsdp=8)):
        job = Job.of(dataclasses.replace(config, mesh=mesh), 257)
        states.append(jax.device_get(init_state(job.blueprint, job.optimizer, 7, job.mesh)))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, states[0])
    job = Job.of(config, 257)
    assert not np.array_equal(
        jax.tree.leaves(job.blueprint.init(jax.random.key(1)))[0], jax.tree.leaves(states[0].params)[0]
    )


def test_useful_flops_are_those_of_the_matrices_that_a_token_meets(config):
    outside, experts = forward_flops_per_token(config.model, 257, 16)
    job = Job.of(config, 257)
    units = job.blueprint.params["stack"]["units"]

    def count(tree):
        return sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "scale" not in str(path))

    used = units["sparse"]["feed_forward"]["experts"]
    assert experts == 2 * count(used) * config.model.moe.top_k / config.model.moe.num_experts
    rest = count(units) - count(used) + count(job.blueprint.params["unembedding"])
    scores = 2 * (16 // 2) * 2 * config.model.heads * config.model.head_dim * config.model.layers
    assert outside == 2 * rest + scores
