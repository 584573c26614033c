"""BASE layers' router against loops, the best assignment there is, and what evenness promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers.routing import BaseRouter, Capacity
from gshardx.layers.routing.base import assignment, units
from gshardx.models.decoder import check_model
from tests.layers.routing.cases import DRAWN, G, capacity_of, check, compiled, data
from tests.oracles import base as oracle

SETTINGS = {
    "even": ((12, 4), Capacity(1.0), {}),
    "does not divide": ((13, 3), Capacity(0.6), {"priority": "gate"}),
    "fewer tokens than experts": ((5, 8), Capacity(None), {}),
    "one expert": ((3, 1), Capacity(None), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    call = compiled(BaseRouter, e, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0) if training else None)
    slots = capacity_of(capacity, s, e, 1, training)
    groups = [oracle.route(np.asarray(logits[g]), slots, valid[g], training=training, **options) for g in range(G)]
    assume(min(group.margin for group in groups) > 3e-4)  # of units of 1 in 2000, which fp32 has to 1e-4
    assert routing.capacity == slots
    check(routing, groups)


AFFINITIES = {
    "random": lambda draw, s, e: draw.normal(size=(s, e)),
    "skewed": lambda draw, s, e: draw.normal(size=(s, e)) + np.linspace(0, 4, e),
    "one expert": lambda draw, s, e: 0.3 * draw.normal(size=(s, e)) + 4 * (np.arange(e) == e - 1),
    "near ties": lambda draw, s, e: 1 + 1e-3 * draw.normal(size=(s, e)),
    "copies": lambda draw, s, e: np.repeat(draw.normal(size=(s // 4, e)), 4, axis=0) + 1e-6 * draw.normal(size=(s, e)),
}


@jax.jit
def assigned(affinity, valid):
    return assignment(units(affinity, valid), valid)[..., 0]


@pytest.mark.parametrize("kind", AFFINITIES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    real=st.sampled_from([128, 128, 61]),
    e=st.sampled_from([8, 64]),  # with two tokens an expert the best sum is the least forgiving
)
def test_the_sum_is_within_a_hundredth_of_the_best_and_loads_are_even(kind, seed, real, e):
    s = 128
    draw = np.random.default_rng(seed)
    affinity = AFFINITIES[kind](draw, s, e).astype(np.float32)[None]
    valid = np.zeros((1, s), bool)
    valid[0, draw.permutation(s)[:real]] = True
    experts = np.asarray(assigned(affinity, valid))[valid]
    load = np.bincount(experts, minlength=e)
    assert load.max() == -(-real // e)
    assert real < s or load.min() == s // e
    assert affinity[valid][np.arange(real), experts].sum() >= 0.99 * oracle.best_sum(affinity[valid])


def test_an_auction_that_takes_too_long_is_finished_evenly_and_near_the_best(monkeypatch):
    """Few places an expert and a strong skew: 200 rounds do not place every token."""
    monkeypatch.setattr("gshardx.layers.routing.base._ROUNDS", 200)
    s, e = 256, 64
    affinity = AFFINITIES["skewed"](np.random.default_rng(10), s, e)
    whole, _ = oracle.rounded(affinity.tolist())
    everyone = np.ones((1, s), bool)
    in_haste = jax.jit(lambda affinity: assignment(units(affinity, everyone), everyone)[..., 0])
    experts = np.asarray(in_haste(affinity.astype(np.float32)[None]))[0]
    np.testing.assert_array_equal(experts, oracle.auction(whole, limit=200))
    assert (experts != oracle.auction(whole, limit=10_000)).any(), "it must have taken too long"
    np.testing.assert_array_equal(np.bincount(experts, minlength=e), np.full(e, s // e))
    assert affinity[np.arange(s), experts].sum() >= 0.99 * oracle.best_sum(affinity)


def test_rounding_of_the_logits_changes_no_choice_of_tokens_that_are_alike():
    """On another mesh logits differ in the last bits."""
    draw = np.random.default_rng(0)
    affinity = np.repeat(draw.normal(size=(4, 4, 8)), 4, axis=1).astype(np.float32)
    everyone = np.ones((4, 16), bool)
    expected = assigned(affinity, everyone)
    for _ in range(5):
        noise = 1 + 1e-7 * draw.normal(size=affinity.shape)
        np.testing.assert_array_equal(assigned((affinity * noise).astype(np.float32), everyone), expected)


def test_a_group_is_even_to_the_token_and_capacity_one_drops_nothing():
    tokens, kernel, valid = data(0, "one expert", 16, 8)
    routing = compiled(BaseRouter, 8, capacity=Capacity(1.0))(kernel, tokens, valid, jax.random.key(0))[0]
    for g in range(G):
        np.testing.assert_array_equal(np.bincount(np.asarray(routing.experts)[g, :, 0], minlength=8), 2)
    assert float(routing.stats.drop_fraction) == 0.0
    assert float(routing.losses["balance"]) == pytest.approx(1.0)


def test_without_a_number_the_assignment_is_still_one():
    affinity = np.full((1, 8, 4), np.nan, np.float32)
    assert (np.bincount(np.asarray(assigned(affinity, np.ones((1, 8), bool)))[0]) == 2).all()


def test_the_kernel_starts_orthogonal_and_learns_by_the_weights():
    router = BaseRouter(8, 4, capacity=Capacity(None), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(router.kernel[...].T @ router.kernel[...], 0.01 * np.eye(4), atol=1e-6)
    tokens, kernel, valid = data(1, "random", 12, 4)
    call = compiled(BaseRouter, 4, capacity=Capacity(None))
    experts = call(kernel, tokens, valid, jax.random.key(0))[0].experts

    def weights(kernel):
        logits = jnp.einsum("gsm,me->gse", tokens, kernel)
        return jax.nn.sigmoid(jnp.take_along_axis(logits, experts, axis=-1)).sum()

    actual = jax.grad(lambda w: call(w, tokens, valid, jax.random.key(0))[0].weights.sum())(kernel)
    np.testing.assert_allclose(actual, jax.grad(weights)(kernel), atol=1e-5)
    assert np.abs(actual).max() > 0.01


def test_more_choices_than_one_are_refused():
    with pytest.raises(BadInput, match=r"model\.moe\.router = base chooses one expert, but .* = 2; use top_k 1"):
        check_model(ModelConfig(moe=MoEConfig(router="base", top_k=2)))
