"""What every router promises: groups alone, padding nowhere, capacity never exceeded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.routing import (
    AdaMoERouter,
    BaseRouter,
    Capacity,
    CosineRouter,
    DselectKRouter,
    DsMoeRouter,
    DynMoERouter,
    GShardRouter,
    MoePlusPlusRouter,
    NoisyTopKRouter,
    QuantileRouter,
    ReluRouter,
    SentenceRouter,
    SigmoidBiasRouter,
    SinkhornRouter,
    SkyworkRouter,
    SmoeDropoutRouter,
    SparseMixerRouter,
    StableRouter,
    SwitchRouter,
    TopKRouter,
)
from gshardx.layers.routing.growth import start
from gshardx.layers.routing.quantile import QuantileState
from gshardx.layers.routing.relu import SparsityState
from gshardx.layers.routing.sigmoid_bias import BiasState
from gshardx.layers.routing.smoe_dropout import ScheduleState
from gshardx.layers.routing.stable import StageState
from tests.layers.routing.cases import M, compiled, data

E, S = 8, 16
FIXED = Capacity(0.0, minimum=2)
BIAS = BiasState(jnp.linspace(-0.2, 0.2, E), jnp.zeros(E))
QUANTILE = QuantileState(jnp.linspace(-0.2, 0.2, E), jnp.zeros(E), jnp.zeros(()))
SPARSITY = SparsityState(*(jnp.float32(x) for x in (0.5, 3, 2)))
ROUTERS = {
    "gshard": (GShardRouter, (E, 2), {}, ()),
    "gshard after": (GShardRouter, (E, 2), {"normalise": "after", "priority": "gate"}, ()),
    "switch": (SwitchRouter, (E,), {"jitter": 0.0}, ()),
    "top_k": (TopKRouter, (E, 3), {"groups": 4, "groups_kept": 2, "renormalise": False}, ()),
    "top_k, rounded": (TopKRouter, (E, 3), {"round_to": 2}, ()),
    "sigmoid_bias": (SigmoidBiasRouter, (E, 2), {"scale": 2.5}, (BIAS,)),
    "noisy_top_k, drawn": (NoisyTopKRouter, (E, 2), {}, ()),
    "dynmoe": (DynMoERouter, (E, 4), {}, (start(M, E, 7),)),
    "adamoe": (AdaMoERouter, (E, 3), {"null_experts": 2}, ()),
    "cosine": (CosineRouter, (E, 2), {"projection": M}, ()),
    "ds_moe": (DsMoeRouter, (E, 2), {}, ()),
    "dselect_k": (DselectKRouter, (E, 2), {"most": 5}, ()),
    "relu": (ReluRouter, (E, 2), {"most": 5}, (SPARSITY,)),
    "smoe_dropout": (SmoeDropoutRouter, (E, 4), {"steps": 100, "serve": 2}, (ScheduleState(jnp.int32(50)),)),
    "skywork": (SkyworkRouter, (E, 2), {"spread": 2.0}, ()),
    "stable": (StableRouter, (E,), {"vocab": 3}, (StageState(jnp.int32(5), jnp.zeros(3, jnp.int32)),)),
    "base": (BaseRouter, (E,), {}, ()),
    "sinkhorn": (SinkhornRouter, (E, 2), {"iterations": 10}, ()),
    "quantile": (QuantileRouter, (E, 2), {"choose_by": "sigmoid"}, (QUANTILE,)),
    "sentence": (SentenceRouter, (E, 2), {}, ()),
    "sparse_mixer": (SparseMixerRouter, (E, 2), {"jitter": 0.0}, ()),
    "sparse_mixer, drawn": (SparseMixerRouter, (E, 3), {"jitter": 0.5}, ()),
    "moe_pp": (MoePlusPlusRouter, (E, 3), {"constant": 1}, ()),
}
EVEN = {"base"}
"""Routers that ask no expert in training for more than these slots."""
CHANGING = {"adamoe", "dselect_k", "dynmoe", "moe_pp", "relu", "smoe_dropout", "top_k, rounded"}
"""Whose tokens want some of their choices only."""
IN_ORDER = {"sentence"}
"""Whose choices hang on earlier tokens of the group."""
EACH = ("experts", "slots", "keep", "weights")


def route(name, tokens, kernel, valid, training, capacity=FIXED):
    make, numbers, options, state = ROUTERS[name]
    call = compiled(make, *numbers, capacity=capacity, **options)
    return call(kernel, tokens, valid, jax.random.key(0) if training else None, *state)[0]


@pytest.mark.parametrize("name", ROUTERS)
def test_no_expert_exceeds_its_capacity_and_kept_slots_have_no_holes(name):
    tokens, kernel, valid = data(0, "random", S, E, g=4, padding="some")
    routing = route(name, tokens, kernel, valid, training=True)
    experts, slots, keep = (np.asarray(getattr(routing, field)) for field in ("experts", "slots", "keep"))
    assert routing.capacity == 2
    wanted = np.broadcast_to(valid[..., None], keep.shape)
    if name in CHANGING:  # those kept where there is room for all
        wanted = np.asarray(route(name, tokens, kernel, valid, training=True, capacity=Capacity(None)).keep)
    full = 0
    for g in range(4):
        for expert in range(E):
            here = (experts[g] == expert) & wanted[g]
            count = min(2, here.sum())
            assert sorted(slots[g][here & keep[g]]) == list(range(count))
            full += here.sum() > 2
    assert (full > 4) == (name not in EVEN)
    np.testing.assert_array_equal(np.asarray(routing.weights)[~keep], 0.0)
    assert (np.asarray(routing.weights)[keep] > 0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_that_change_groups_change_only_those_groups(name, training):
    tokens, kernel, valid = data(1, "random", S, E, g=4, padding="some")
    order = np.random.default_rng(1).permutation(2 * S)
    moved = tokens.copy()
    moved[:2] = tokens[:2].reshape(2 * S, -1)[order].reshape(2, S, -1)
    before, after = (route(name, x, kernel, valid, training) for x in (tokens, moved))
    for field in EACH:
        np.testing.assert_array_equal(getattr(before, field)[2:], getattr(after, field)[2:])
    for g in (0, 1):
        assert (np.asarray(before.experts[g]) != np.asarray(after.experts[g])).any()


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in IN_ORDER])
def test_without_dropping_a_permutation_of_a_group_permutes_its_routing(name):
    tokens, kernel, valid = data(2, "random", S, E, g=4, padding="some")
    order = np.random.default_rng(2).permutation(S)
    before = route(name, tokens, kernel, valid, training=False)
    after = route(name, tokens[:, order], kernel, valid[:, order], training=False)
    assert before.capacity == S
    np.testing.assert_array_equal(np.asarray(before.experts)[:, order], after.experts)
    np.testing.assert_array_equal(np.asarray(before.keep)[:, order], after.keep)
    kept = np.asarray(before.keep)
    assert name in CHANGING or (kept == valid[..., None]).all()
    assert float(before.stats.drop_fraction) == 0
    assert not np.asarray(before.keep)[~valid].any()
    np.testing.assert_allclose(np.asarray(before.weights)[:, order], after.weights, atol=1e-6)
    for loss in before.losses:
        np.testing.assert_allclose(before.losses[loss], after.losses[loss], rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_what_padding_holds_changes_nothing(name, training):
    tokens, kernel, valid = data(3, "random", S, E, g=4, padding="some")
    other = np.where(valid[..., None], tokens, np.float32(50.0))
    before, after = (route(name, x, kernel, valid, training) for x in (tokens, other))
    assert not np.asarray(after.keep)[~valid].any()
    np.testing.assert_array_equal(before.keep, after.keep)
    np.testing.assert_array_equal(before.weights, after.weights)
    for field in ("experts", "slots"):
        np.testing.assert_array_equal(
            np.asarray(getattr(before, field))[valid], np.asarray(getattr(after, field))[valid]
        )
    for part in ("losses", "stats", "state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))


@pytest.mark.parametrize("name", [name for name in ROUTERS if "drawn" not in name])  # draws belong to places
def test_tokens_are_routed_with_padding_as_without_it(name):
    real, kernel, _ = data(4, "random", 12, E, g=4)
    junk = data(5, "random", S, E, g=4)[0]
    places = np.sort(np.random.default_rng(5).permutation(S)[:12])
    valid = np.zeros((4, S), bool)
    valid[:, places] = True
    junk[:, places] = real
    alone = route(name, real, kernel, np.ones((4, 12), bool), training=True)
    padded = route(name, junk, kernel, valid, training=True)
    for field in ("experts", "keep"):
        np.testing.assert_array_equal(getattr(alone, field), np.asarray(getattr(padded, field))[:, places])
    kept = np.asarray(alone.keep)
    np.testing.assert_array_equal(np.asarray(alone.slots)[kept], np.asarray(padded.slots)[:, places][kept])
    np.testing.assert_allclose(alone.weights, np.asarray(padded.weights)[:, places], atol=1e-6)
    for loss in alone.losses:
        np.testing.assert_allclose(alone.losses[loss], padded.losses[loss], rtol=1e-5)
    for field in ("tokens", "choices", "dropped", "load"):
        np.testing.assert_array_equal(getattr(alone.stats, field), getattr(padded.stats, field))
    for field in ("entropy", "z", "largest_logit"):
        np.testing.assert_allclose(getattr(alone.stats, field), getattr(padded.stats, field), rtol=1e-5)
    assert 0 <= float(alone.stats.drop_fraction) < 1
    assert (float(alone.stats.drop_fraction) > 0) == (name not in EVEN)


def test_tokens_of_low_precision_are_routed_in_float32():
    tokens, kernel, valid = data(6, "random", S, E, g=4)
    rounded = jnp.asarray(tokens, jnp.bfloat16)
    low = route("gshard", rounded, kernel, valid, training=False)
    high = route("gshard", rounded.astype(jnp.float32), kernel, valid, training=False)
    assert low.weights.dtype == jnp.float32
    np.testing.assert_array_equal(low.experts, high.experts)
    np.testing.assert_allclose(low.weights, high.weights, atol=1e-6)
