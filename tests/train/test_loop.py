"""The loop in this process: what it compiles, and what it measures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers import Packed
from gshardx.models.build import Variables
from gshardx.sharding import MeshConfig
from gshardx.train import loop
from gshardx.train.evaluate import bits_per_byte, xz_bits_per_byte
from gshardx.train.flops import forward_flops_per_token
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir
from gshardx.train.state import init_state
from gshardx.train.text import read_text


def test_nothing_is_compiled_after_the_second_step(config, tmp_path, monkeypatch):
    step, compiled = [0], []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(step[0])

    put = loop.Meter.put

    def counted(self, number, *more):
        step[0] = number
        put(self, number, *more)

    monkeypatch.setattr(loop.Meter, "put", counted)
    monkeypatch.setattr(loop, "report", lambda *_: step.__setitem__(0, -1))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert loop.train(config, RunDir(tmp_path / "run"), "command") == 0
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled.count(0) >= 2, "the listener must have seen the step being compiled"
    assert [number for number in compiled if number >= 2] == []


def test_bits_per_byte_is_the_cross_entropy_of_every_byte(config):
    text = read_text(config.data)
    job = Job.of(config, text.tokenizer.vocab_size)
    params = job.blueprint.init(jax.random.key(0))
    variables = Variables(params, job.blueprint.init_router())
    bits = bits_per_byte(job, variables, text)

    model, nats, targets = job.blueprint.bind(jax.device_put(jax.device_get(params), jax.devices()[0])), 0.0, 0

    @jax.jit
    def scores(tokens, valid):
        positions = jnp.arange(16, dtype=jnp.int32)[None]
        memory = Packed.of(valid[None].astype(int))
        hidden, _, _ = model.hidden(tokens[None], positions, valid[None], memory, None, ())
        return jax.nn.log_softmax(model.logits(hidden)[0])

    for ids in text.held_out:
        for at in range(1, len(ids)):  # each token from its own window, one at a time
            window = ids[8 * max(0, math.ceil((at - 16) / 8)) : at]
            padded = np.pad(window, (0, 16 - len(window)))
            nats -= float(scores(padded, np.arange(16) < len(window))[len(window) - 1, ids[at]])
            targets += 1
            assert len(window) >= min(at, 8)
    size = sum(len(document) for document in text.held_out_documents)
    assert targets == size + len(text.held_out_documents)  # each byte, and the end of each document
    assert bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_xz_reads_the_training_text_first(config):
    text = read_text(config.data)
    known = xz_bits_per_byte(text)
    unknown = xz_bits_per_byte(dataclasses.replace(text, training_documents=["@"]))
    assert known < unknown
    assert xz_bits_per_byte(dataclasses.replace(text, training_documents=["x" * 9_000_000])) is None


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
