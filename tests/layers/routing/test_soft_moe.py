"""Soft MoE against loops, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from gshardx.config import MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import Auto, Dense, Experts, Gather, Mixing, MoE, Ragged
from gshardx.layers.routing import SoftMoERouter
from gshardx.layers.routing.statistics import describe
from gshardx.models.moe import check_router_options, dispatcher_reason, training_slots
from tests.layers.routing.cases import DRAWN, G, M, compiled, data
from tests.oracles import choice
from tests.oracles import soft_moe as oracle

S, E = 12, 4
SETTINGS = {"one slot": (12, 8, 1), "several": (13, 3, 4), "more slots than tokens": (1, 3, 2)}


def route(tokens, kernel, valid, slots=3, rng=None):
    return compiled(SoftMoERouter, kernel.shape[1] // slots, slots=slots)(kernel, tokens, valid, rng)[0]


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    s, e, p = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e * p, padding=padding)
    scale = np.float32(np.random.default_rng(seed).uniform(-1, 5, 1))
    routing, logits = compiled(SoftMoERouter, e, slots=p)(kernel, tokens, valid, jax.random.key(0), scale=scale)
    z = 0.0
    for g in range(G):
        dispatch, combine, expected = oracle.mix(tokens[g], kernel, float(scale[0]), valid[g])
        np.testing.assert_allclose(logits[g], expected, atol=3e-6)
        np.testing.assert_allclose(routing.input_weights[g], dispatch, atol=3e-6)
        np.testing.assert_allclose(routing.weights[g], combine, atol=3e-6)
        z += choice.z(expected, valid[g]) * valid[g].sum() / max(valid.sum(), 1)
    np.testing.assert_array_equal(routing.keep, np.broadcast_to(valid[..., None], routing.keep.shape))
    np.testing.assert_array_equal(routing.experts[0, 0] * p + routing.slots[0, 0], np.arange(e * p))
    assert float(routing.losses["balance"]) == pytest.approx(1.0 if valid.any() else 0.0, abs=1e-5)
    assert float(routing.losses["z"]) == pytest.approx(z, rel=1e-5)


def soft_layer(dispatcher=None, slots=3):
    rngs = nnx.Rngs(0)
    experts = Experts(E, M, 6, "relu", biases=True, rngs=rngs)
    experts.b_down.set_value(jax.random.normal(jax.random.key(2), (E, M)))
    router = SoftMoERouter(M, E, slots=slots, rngs=rngs)
    router.scale.set_value(jnp.full((1,), 4.0))
    return MoE(router, dispatcher or Auto(hidden=6), experts)


def test_the_layer_is_one_of_mixtures():
    moe, (tokens, _, valid) = soft_layer(), data(0, "random", S, 1, padding="some")
    out, _ = jax.jit(moe)(tokens, valid, jax.random.key(0))
    w_up, b_up, w_down, b_down = (
        np.asarray(getattr(moe.experts, name)[...], np.float64) for name in ("w_up", "b_up", "w_down", "b_down")
    )

    def expert(number, vector):
        return np.maximum(vector @ w_up[number] + b_up[number], 0) @ w_down[number] + b_down[number]

    for g in range(G):
        dispatch, combine, _ = oracle.mix(tokens[g], np.asarray(moe.router.kernel[...]), 4.0, valid[g])
        np.testing.assert_allclose(out[g], oracle.layer(tokens[g], dispatch, combine, 3, expert), atol=1e-5)
    assert np.abs(np.asarray(out)[valid]).min() > 0
    np.testing.assert_array_equal(np.asarray(out)[~valid], 0.0)


def test_a_permutation_of_a_group_permutes_its_output():
    moe, (tokens, _, valid) = soft_layer(), data(1, "random", S, 1, padding="some")
    order = np.random.default_rng(1).permutation(S)
    run = jax.jit(moe)
    out, _ = run(tokens, valid, jax.random.key(0))
    moved, _ = run(tokens[:, order], valid[:, order], jax.random.key(0))
    np.testing.assert_allclose(moved, np.asarray(out)[:, order], atol=1e-6)


def test_training_and_inference_mix_alike():
    moe, (tokens, _, valid) = soft_layer(), data(2, "random", S, 1, padding="some")
    training, inference = (jax.jit(moe)(tokens, valid, rng)[0] for rng in (jax.random.key(0), None))
    np.testing.assert_array_equal(training, inference)


def test_groups_and_what_padding_holds_change_nothing():
    tokens, kernel, valid = data(3, "random", S, E * 3, g=4, padding="some")
    before = route(tokens, kernel, valid)
    junk = route(np.where(valid[..., None], tokens, np.float32(50.0)), kernel, valid)
    for name in ("weights", "input_weights", "losses", "stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(junk, name))
    others = route(np.concatenate([tokens[:2], tokens[2:] + 1]), kernel, valid)
    for name in ("weights", "input_weights"):
        np.testing.assert_array_equal(getattr(before, name)[:2], getattr(others, name)[:2])
        assert np.abs(np.asarray(getattr(before, name) - getattr(others, name))[2:]).max() > 1e-3


def test_tokens_are_mixed_with_padding_as_without_it():
    real, kernel, _ = data(4, "random", S, E * 3)
    padded, places = data(5, "random", S + 4, 1)[0], np.sort(np.random.default_rng(5).permutation(S + 4)[:S])
    valid = np.zeros((G, S + 4), bool)
    padded[:, places], valid[:, places] = real, True
    alone, among = route(real, kernel, np.ones((G, S), bool)), route(padded, kernel, valid)
    for name in ("weights", "input_weights"):
        np.testing.assert_allclose(getattr(alone, name), np.asarray(getattr(among, name))[:, places], atol=1e-6)
    for field in ("tokens", "choices", "load", "entropy", "z", "largest_logit"):
        np.testing.assert_allclose(getattr(alone.stats, field), getattr(among.stats, field), rtol=1e-5)


def test_every_slot_is_full_and_every_expert_has_as_many():
    tokens, kernel, valid = data(6, "one expert", S, E * 3, padding="some")
    valid[0] = False
    figures = describe(jax.device_get(route(tokens, kernel, valid).stats))
    assert figures["drop_fraction"] == 0
    assert figures["dead_experts"] == 0
    assert figures["load_max_over_mean"] == pytest.approx(1.0)
    assert figures["capacity_used"] == pytest.approx((G - 1) / G), "a group of padding fills none"
    assert len([name for name in figures if name.startswith("drop_fraction_choice")]) == 1


@pytest.mark.parametrize("kind", ["zeros", "padding", "ties"])
def test_gradients_are_finite_and_reach_everything(kind):
    moe, (tokens, _, valid) = soft_layer(), data(7, "random", S, 1, padding="some")
    if kind == "padding":
        valid[:] = False
    tokens *= kind != "zeros"
    moe.router.kernel.set_value(moe.router.kernel[...] * (kind != "ties"))
    graph, params = nnx.split(moe, nnx.Param)

    def loss(params, tokens):
        out, metrics = nnx.merge(graph, params)(tokens, valid, jax.random.key(0))
        return jnp.sum(jnp.sin(out)) + metrics.losses["balance"] + metrics.losses["z"]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if kind == "ties":
        assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient[0].router.kernel))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": 0}, "slots = 0: must be 1 or more"),
        ({"priority": "gate"}, "priority = gate: every token is in every slot"),
        ({"output_masking": 0.2}, "output_masking = 0.2: every token is in every slot"),
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        SoftMoERouter(M, E, **options, rngs=nnx.Rngs(0))


def test_dispatchers_of_whole_tokens_are_refused():
    tokens, _, valid = data(0, "random", S, 1)
    for dispatcher in (Gather(), Ragged(), Dense()):
        with pytest.raises(BadInput, match=r"one token in a slot, and this router mixes all; use Mixing\(\)"):
            soft_layer(dispatcher)(tokens, valid, None)
    for name in ("gather", "ragged"):
        with pytest.raises(BadInput, match=rf"dispatcher = {name} puts one token in a slot, .*; use auto"):
            check_router_options(MoEConfig(router="soft_moe", dispatcher=name))
    assert "mixing: router soft_moe" in dispatcher_reason(MoEConfig(router="soft_moe"), 128)


def test_there_are_as_many_slots_whatever_the_group_and_the_capacity():
    moe = MoEConfig(router="soft_moe", router_options={"slots": 5}, capacity_factor=None)
    assert [training_slots(moe, group) for group in (1, 5, 512)] == [5, 5, 5]


def test_auto_is_mixing():
    tokens, _, valid = data(0, "random", S, 1)
    auto, mixing = (jax.jit(soft_layer(one))(tokens, valid, None)[0] for one in (Auto(hidden=6), Mixing()))
    np.testing.assert_array_equal(auto, mixing)
