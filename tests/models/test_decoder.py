"""The decoder: depth costs no HLO, packing changes no number."""

import jax
import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from gshardx.models.build import Variables, blueprint
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.train.objective import Batch
from gshardx.train.optimizer import build_optimizer
from gshardx.train.state import abstract_state, init_state
from gshardx.train.step import TrainStep, abstract_batch, compile_eval_step, compile_train_step

VOCAB, ROWS, LENGTH = 32, 8, 16


def model(layers=4, **moe):
    return ModelConfig(
        layers=layers,
        width=16,
        heads=4,
        kv_heads=2,
        head_dim=4,
        hidden=24,
        moe=MoEConfig(**{"num_experts": 8, "hidden": 8, **moe}),
    )


def compiled(config, mesh_config):
    mesh = build_mesh(mesh_config)
    plan = blueprint(config, VOCAB, mesh)
    optimizer = build_optimizer(OptimizerConfig(warmup_steps=1), 10, plan.axes)
    batch = abstract_batch(ROWS, LENGTH, mesh)
    update = TrainStep(plan, optimizer, TrainConfig())
    step = compile_train_step(update, abstract_state(plan, optimizer, mesh), batch, mesh)
    return mesh, plan, optimizer, batch, step


def packed_batch(abstract):
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    segments = np.repeat([[1] * 8 + [2] * 5 + [0] * 3], ROWS, axis=0).astype(np.int32)
    segments[0] = 1
    positions = np.concatenate([np.arange(8), np.arange(5), np.zeros(3)]).astype(np.int32)
    positions = np.repeat(positions[None], ROWS, axis=0)
    positions[0] = np.arange(LENGTH)
    arrays = (tokens, targets, segments, positions, (segments > 0).astype(np.float32))
    return Batch(*[jax.device_put(x, a.sharding) for x, a in zip(arrays, abstract, strict=True)])


def train(config, mesh_config, steps=2):
    mesh, plan, optimizer, abstract, step = compiled(config, mesh_config)
    state = init_state(plan, optimizer, 0, mesh)
    losses = []
    for _ in range(steps):
        state, metrics = jax.block_until_ready(step(state, packed_batch(abstract)))
        losses.append((float(metrics.loss), float(metrics.aux_losses["balance"].mean()), float(metrics.grad_norm)))
    return losses, jax.device_get(state.params)


def test_hlo_size_does_not_grow_with_depth():
    sizes = [compiled(model(layers), MeshConfig(expert=8))[-1].hlo_instructions for layers in (4, 16)]
    assert sizes[0] == sizes[1] > 100


def test_padding_and_packing_change_no_loss():
    """Two documents in one row cost what they cost in rows of their own."""
    mesh = build_mesh(MeshConfig())
    plan = blueprint(model(), VOCAB, mesh)
    step = compile_eval_step(plan, abstract_batch(ROWS, LENGTH, mesh), mesh)
    variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
    draw = np.random.default_rng(1)
    one, two = draw.integers(0, VOCAB, (2, 9)), draw.integers(0, VOCAB, (2, 6))  # tokens, targets

    def cost(rows):
        arrays = np.zeros((5, ROWS, LENGTH), np.int32)
        for row, documents in enumerate(rows):
            start = 0
            for number, document in enumerate(documents, 1):
                length = document.shape[1]
                filled = (*document, np.full(length, number), np.arange(length), np.ones(length))
                arrays[:, row, start : start + length] = filled
                start += length
        batch = Batch(*map(jax.numpy.asarray, arrays))
        return float(step(variables, batch._replace(weights=batch.weights.astype(jax.numpy.float32))))

    packed, apart = cost([[one, two]]), cost([[one], [two]])
    assert packed > 15
    assert packed == pytest.approx(apart, rel=1e-6)
    assert cost([[two, one]]) == pytest.approx(packed, rel=1e-6)


def test_a_models_structure_can_be_hashed():
    first, second = (blueprint(model(losses={"z": 0.1}), VOCAB, build_mesh(MeshConfig())).graph for _ in range(2))
    assert hash(first) == hash(second)


def test_layers_repeat_dense_and_moe_blocks():
    plan = blueprint(model(every=2), VOCAB, build_mesh(MeshConfig()))
    units = plan.params["stack"]["units"]
    assert units["sparse"]["feed_forward"]["experts"]["w_up"].shape == (2, 8, 16, 8)
    assert units["dense"][0]["feed_forward"]["w_up"].shape == (2, 16, 24)
    every_layer = blueprint(model(every=1), VOCAB, build_mesh(MeshConfig())).params["stack"]["units"]
    assert "dense" not in every_layer
    assert every_layer["sparse"]["feed_forward"]["experts"]["w_up"].shape == (4, 8, 16, 8)


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
    import dataclasses

    losses, _ = train(model(), MeshConfig(), steps=1)
    low, _ = train(dataclasses.replace(model(), dtype="bfloat16"), MeshConfig(), steps=1)
    assert low[0][0] == pytest.approx(losses[0][0], rel=0.02)
    assert low[0][0] != losses[0][0]
