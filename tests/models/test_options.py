"""The decoder's options in training on a mesh, with a cache, and in the paged engine: one model each time."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from gshardx.errors import BadInput
from gshardx.models.build import Variables, blueprint
from gshardx.models.decoder import check_model
from gshardx.models.generator import Generator, SamplingOptions
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.train.optimizer import build_optimizer
from gshardx.train.optimizers.groups import by_names, decays
from gshardx.train.state import abstract_state, init_state
from gshardx.train.step import TrainStep, abstract_batch, compile_train_step
from tests.infer.answers import answered, check_against_full_pass
from tests.infer.conftest import Model
from tests.infer.test_engine import plain
from tests.models.test_decode import full_logits
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, packed_batch

BASE = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=4, hidden=24, norm_epsilon=0.01,
    moe=MoEConfig(num_experts=8, hidden=8, router="top_k", router_options={"softmax": "after"}),
)  # fmt: skip
MODELS = {
    "biases, norm of heads, scales": dataclasses.replace(
        BASE, attention={"biases": "qkvo", "qk_norm": "head"},
        scales={"embedding": 2.0, "residual": 0.5, "attention": 0.3, "logits": 0.25},
    ),
    "norm of all, clip, tied": dataclasses.replace(
        BASE, attention={"biases": "qkv", "qk_norm": "whole", "qkv_clip": 0.5},
        tie_embeddings=True, scales={"logits": 1.0},
    ),
    "layer norms, bias of tied logits": dataclasses.replace(
        BASE, layers=3, moe=dataclasses.replace(BASE.moe, dense_first=1), tie_embeddings=True,
        options={"norm": "layer", "logits_bias": True}, logit_cap=3.0,
    ),
    "dense first": dataclasses.replace(
        BASE, layers=3, moe=dataclasses.replace(BASE.moe, dense_first=1), scales={"embedding": 3.0}
    ),
    "one expert": dataclasses.replace(
        BASE, moe=MoEConfig(num_experts=1, top_k=1, every=1, hidden=24, router="top_k", capacity_factor=None)
    ),
}  # fmt: skip
CASES = [  # half a minute each, as they compile
    pytest.param(config, id=name, marks=pytest.mark.sweep if number else pytest.mark.slow)
    for number, (name, config) in enumerate(MODELS.items())
]


def stirred(params):
    """Random values in what starts at 0 or 1."""
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jax.device_put(np.asarray(p) + draw.normal(0, 0.1, p.shape).astype(np.float32), p.sharding), params
    )


def trained(config, mesh_config):
    mesh = build_mesh(mesh_config)
    plan = blueprint(config, VOCAB, mesh)
    optimizer = build_optimizer(OptimizerConfig(warmup_steps=1, epsilon=1e-2), 10, plan.axes)
    batch = abstract_batch(ROWS, LENGTH, mesh)
    step = compile_train_step(
        TrainStep(plan, optimizer, TrainConfig()), abstract_state(plan, optimizer, mesh), batch, mesh
    )
    state = init_state(plan, optimizer, 0, mesh)
    state = dataclasses.replace(state, params=stirred(state.params))
    found = []
    for _ in range(2):
        state, metrics = jax.block_until_ready(step(state, packed_batch(batch)))
        found += [float(metrics.loss), float(metrics.grad_norm)]
    return found


@pytest.mark.parametrize("config", CASES)
def test_a_mesh_changes_no_number_of_training(config):
    one_expert = config.moe.num_experts == 1
    mesh = MeshConfig(data=2, fsdp=2, tensor=2) if one_expert else MeshConfig(fsdp=2, expert=2, tensor=2)
    np.testing.assert_allclose(trained(config, mesh), trained(config, MeshConfig()), rtol=2e-5)


@pytest.mark.parametrize("config", CASES)
def test_the_cache_and_the_pages_give_what_the_full_pass_does(config):
    model = Model(config=config)
    model.variables = Variables(stirred(model.variables.params), ())
    generator = Generator(model.plan, model.variables, model.mesh, length=32, rows=1, chunk=8)
    prompt = np.arange(3, 14, dtype=np.int32)
    drawn = [one.token for one in generator.generate([prompt], 8, SamplingOptions(temperature=0.0))]
    logits = full_logits(model.plan, model.variables, np.concatenate([prompt, drawn]).astype(np.int32))
    assert drawn == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    requests = plain(1, 4)
    check_against_full_pass(model.plan, model.variables, requests, answered(model.engine(), requests))


def test_biases_and_norms_of_heads_do_not_decay():
    plan = blueprint(MODELS["biases, norm of heads, scales"], VOCAB, build_mesh(MeshConfig()))
    attention = by_names(decays, plan.axes)["stack"]["units"]["sparse"]["attention"]
    assert {name for name, decayed in attention.items() if decayed is True} == {"w_q", "w_k", "w_v", "w_o"}
    whole = blueprint(MODELS["norm of all, clip, tied"], VOCAB, build_mesh(MeshConfig()))
    attention = by_names(decays, whole.axes)["stack"]["units"]["sparse"]["attention"]
    assert attention["q_norm"] == {"scale": False}


def test_layer_norms_and_the_bias_of_the_logits_do_not_decay_and_are_refused_if_misspelt():
    plan = blueprint(MODELS["layer norms, bias of tied logits"], VOCAB, build_mesh(MeshConfig()))
    decayed = by_names(decays, plan.axes)
    norm = {"scale": False, "bias": False}
    sparse = decayed["stack"]["units"]["sparse"]
    assert [sparse["attention_norm"], sparse["feed_forward_norm"], decayed["final_norm"]] == [norm] * 3
    assert decayed["logits_bias"] is False
    for options, said in (
        ({"norms": "layer"}, r"model\.options\.norms: model has no such option; did you mean 'norm'"),
        ({"norm": "batch"}, r"model\.options\.norm = batch: use one of rms, layer"),
        ({"logits_bias": 1}, r"model\.options\.logits_bias = 1: expected bool"),
    ):
        with pytest.raises(BadInput, match=said):
            check_model(dataclasses.replace(BASE, options=options))
