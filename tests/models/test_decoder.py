"""The decoder: depth costs no HLO, packing changes no number."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from gshardx.layers import Packed
from gshardx.layers.draws import row_keys
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


def noisy_rule(step, abstract):
    """Fresh rows whose targets follow from the tokens 7 times in 10, so that no mean loss gets below 1.6 nats."""
    draw = np.random.default_rng(step)
    batch = packed_batch(abstract)
    tokens, noise = draw.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    targets = np.where(draw.random((ROWS, LENGTH)) < 0.7, (5 * tokens + 1) % VOCAB, noise).astype(np.int32)
    places = abstract.tokens.sharding, abstract.targets.sharding
    return batch._replace(**dict(zip(("tokens", "targets"), jax.device_put((tokens, targets), places), strict=True)))


def train(config, mesh_config, steps=2, batch_of=lambda step, abstract: packed_batch(abstract)):
    mesh, plan, optimizer, abstract, step = compiled(config, mesh_config)
    state = init_state(plan, optimizer, 0, mesh)
    losses = []
    for number in range(steps):
        state, metrics = jax.block_until_ready(step(state, batch_of(number, abstract)))
        losses.append((float(metrics.loss), float(metrics.aux_losses["balance"].mean()), float(metrics.grad_norm)))
    return losses, jax.device_get(state.params)


@pytest.mark.slow
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
        scores = step(variables, batch._replace(weights=batch.weights.astype(jax.numpy.float32)))
        return float(scores.nats.sum())

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


def scores(config, keys=None):
    """Logits of a batch, and the decoder."""
    plan = blueprint(config, VOCAB, build_mesh(MeshConfig()))
    decoder = plan.bind(plan.init(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    positions = np.cumsum(ones, axis=1) - 1

    @jax.jit
    def run():
        hidden, _, _ = decoder.hidden(tokens, positions, ones > 0, Packed.of(ones), keys, plan.init_router())
        return hidden, decoder.logits(hidden)

    return decoder, *run()


def test_tied_logits_are_the_table_s_products():
    decoder, hidden, logits = scores(dataclasses.replace(model(), tie_embeddings=True))
    assert decoder.unembedding is None
    table = np.asarray(decoder.embedding.table[...], np.float64)
    np.testing.assert_allclose(logits, np.asarray(hidden, np.float64) @ table.T / 4, rtol=1e-4, atol=1e-5)
    assert 0.3 < np.std(logits) < 3


def test_capped_logits_stay_below_the_cap():
    _, _, plain = scores(model())
    _, _, capped = scores(dataclasses.replace(model(), logit_cap=0.5))
    np.testing.assert_allclose(capped, 0.5 * np.tanh(np.asarray(plain) / 0.5), rtol=1e-4, atol=1e-5)
    assert np.abs(plain).max() > 0.5 > np.abs(capped).max()


def test_dropout_draws_by_row_and_only_with_keys():
    config = dataclasses.replace(model(capacity_factor=None), dropout=0.5)
    keys = row_keys(jax.random.key(1), ROWS)
    _, plain, _ = scores(model(capacity_factor=None))
    _, without, _ = scores(config)
    np.testing.assert_array_equal(without, plain)
    _, first, _ = scores(config, keys)
    _, second, _ = scores(config, keys.at[0].set(keys[1]))
    assert np.abs(first - plain).max() > 0.1
    np.testing.assert_array_equal(np.asarray(first)[1:], np.asarray(second)[1:])
    assert np.abs(np.asarray(first - second)[0]).max() > 0.1


@pytest.mark.parametrize(
    "part",
    [
        "experts",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("residual", "attention", "feed_forward", "logits")),
    ],
)
def test_a_part_in_float32_comes_nearer_to_float32(part):
    """In bfloat16 with one part in float32: another result, and the part's products are in float32."""
    low = dataclasses.replace(model(layers=2), dtype="bfloat16")
    _, _, all_low = scores(low)
    _, _, island = scores(dataclasses.replace(low, float32=[part]))
    _, _, high = scores(model(layers=2))
    assert island.dtype == high.dtype == np.float32
    assert np.abs(island - all_low).max() > 0
    assert np.abs(island - high).max() < 2 * np.abs(all_low - high).max()


def test_all_parts_in_float32_are_float32():
    low = dataclasses.replace(model(), dtype="bfloat16")
    parts = ["residual", "attention", "feed_forward", "experts", "logits"]
    np.testing.assert_array_equal(scores(dataclasses.replace(low, float32=parts))[2], scores(model())[2])


@pytest.mark.slow
def test_bfloat16_stays_near_float32_for_500_steps():
    """Mean loss of each 50 steps within 2 % of float32's, and some of it learnt."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        each, _ = train(dataclasses.replace(model(layers=2), dtype=dtype), MeshConfig(), 500, noisy_rule)
        losses[dtype] = np.array(each)[:, 0].reshape(10, 50).mean(1)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
    assert losses["float32"][-1] < 0.9 * losses["float32"][0]
    assert (losses["bfloat16"] != losses["float32"]).all()
