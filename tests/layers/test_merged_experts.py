"""Tokens shown to experts, against slots; and one expert after another, against all at once."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshardx.layers import Capacity, Dense, Experts, Gather, MergedExperts, MoE, SigmoidBiasRouter, TopKRouter
from gshardx.layers.dense import Shown
from gshardx.sharding import MeshConfig, build_mesh

E, M, H = 8, 16, 24


def merged_experts(biases=False, sliced=False):
    rngs = nnx.Rngs(0)
    experts = Experts(E, M, H, "swiglu", biases=biases, rngs=rngs)
    if biases:
        for name in ("b_up", "b_gate", "b_down"):
            value = getattr(experts, name)
            value.set_value(jax.random.normal(jax.random.key(5), value.get_value().shape))
    return experts, MergedExperts(experts, sliced=sliced)


def moe(dispatcher, router=TopKRouter, biases=False, plain=False, sliced=False, **options):
    rngs = nnx.Rngs(0)
    dropless = Capacity(None)
    experts, together = merged_experts(biases, sliced)
    how = experts if plain else together
    return MoE(router(M, E, 2, capacity=dropless, rngs=rngs, **options), dispatcher, how)


def tokens(rows, seed=1):
    x = np.random.default_rng(seed).normal(size=(8, rows, M)).astype(np.float32)
    valid = np.ones((8, rows), bool)
    valid[:, -1] = rows == 1
    return jnp.asarray(x), jnp.asarray(valid)


CASES = {
    "softmax": {},
    "biases": {"biases": True},
    "weights on inputs": {"router": SigmoidBiasRouter, "weigh": "input"},
}


def outputs(model, x, valid):
    return jax.jit(lambda x, valid: model(x, valid, None, model.router.initial_state())[0])(x, valid)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_slices_of_all_experts_add_up(case):
    x, valid = tokens(6)
    expected = outputs(moe(Gather(), plain=True, **CASES[case]), x, valid)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        found = outputs(moe(Dense(), sliced=True, **CASES[case]), x, valid)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("dispatcher", [Dense, Gather])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", [None, pytest.param(MeshConfig(data=2, expert=2, tensor=2), marks=pytest.mark.slow)])
def test_the_same_as_experts_in_slots(dispatcher, case, mesh):
    x, valid = tokens(6)
    expected = outputs(moe(Gather(), plain=True, **CASES[case]), x, valid)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(build_mesh(mesh)):
        found = outputs(moe(dispatcher(), **CASES[case]), x, valid)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not np.asarray(found)[:, -1].any(), "padding gets nothing"


def shown(rows, seed=2):
    draw = np.random.default_rng(seed)
    experts = np.stack([draw.permutation(E)[:2] for _ in range(rows)])[None]
    return Shown(
        jnp.asarray(draw.normal(size=(1, rows, M)), jnp.float32), jnp.asarray(experts),
        jnp.asarray(draw.uniform(0.1, 1, (1, rows, 2)), jnp.float32), None,
    )  # fmt: skip


def first(x, rows):
    return jax.tree.map(lambda leaf: leaf[:, :rows], x)


def test_plain_experts_say_what_dense_needs():
    experts, _ = merged_experts()
    with pytest.raises(TypeError, match="pair it with MergedExperts"):
        experts(shown(2))


@pytest.mark.parametrize("scaled", [False, True], ids=["", "inputs weighed"])
def test_however_many_are_shown_a_token_gets_the_same_bits(scaled):
    """One expert after the other (3 tokens), all with all rows (8), with 16 (32), with all again where one is
    everybody's; beside a token that is NaN."""
    experts, x = merged_experts()[1], shown(32)
    if scaled:
        x = dataclasses.replace(x, input_weights=x.weights[..., ::-1])
    assert np.bincount(np.ravel(x.experts)).max() <= 16
    compute = jax.jit(lambda x: experts(x))
    usual = compute(x)
    np.testing.assert_array_equal(compute(first(x, 3)), usual[:, :3])
    np.testing.assert_array_equal(compute(first(x, 8)), usual[:, :8])
    busy = dataclasses.replace(x, experts=x.experts.at[:, 3:].set(x.experts[:, :1]))
    np.testing.assert_array_equal(compute(busy)[:, :3], usual[:, :3])
    spoilt = compute(dataclasses.replace(x, values=x.values.at[:, 5].set(jnp.nan)))
    assert np.isnan(spoilt[:, 5]).all()
    np.testing.assert_array_equal(np.delete(spoilt, 5, 1), np.delete(usual, 5, 1))


def test_few_tokens_read_no_expert_but_their_own():
    """The compiled loop turns as often as there are experts with a token, and a NaN elsewhere is never touched."""
    experts, x = merged_experts()[1], first(shown(8), 3)
    others = sorted(set(range(E)) - set(np.asarray(x.experts).ravel().tolist()))
    expected = experts(x)
    for weight in (experts.w_in, experts.w_down):
        weight.set_value(weight.get_value().at[np.asarray(others)].set(jnp.nan))
    np.testing.assert_array_equal(experts(x), expected)
    text = jax.jit(lambda x: experts(x)).lower(x).as_text()
    assert "stablehlo.while" in text
    assert f"tensor<{E}x3x" not in text, "some product has all experts in it"
