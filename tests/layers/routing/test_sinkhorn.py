"""Sinkhorn routing against the products that define it, and what an even plan promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, SinkhornRouter
from gshardx.layers.routing.sinkhorn import chosen, offsets
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import sinkhorn as oracle

SETTINGS = {
    "one": ((12, 4, 1), Capacity(1.0), {}),
    "two, sharp": ((13, 8, 2), Capacity(0.6), {"temperature": 0.5, "iterations": 20, "priority": "gate"}),
    "fewer tokens than experts": ((3, 8, 3), Capacity(None), {"iterations": 5}),
    "one token": ((1, 3, 2), Capacity(None), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_products_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    call = compiled(SinkhornRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0) if training else None)
    slots = capacity_of(capacity, s, e, k, training)
    groups = [oracle.route(np.asarray(logits[g]), k, slots, valid[g], training=training, **options) for g in range(G)]
    assume(min(group.margin for group in groups) > 3e-5)
    assert routing.capacity == slots
    check(routing, groups)


def skewed(seed, tokens, e):
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(2, tokens, e)) + np.linspace(0, 4, e)).astype(np.float32)


@pytest.mark.parametrize("padding", [0, 77])
def test_tokens_and_experts_have_even_shares_of_the_plan_after_50_iterations(padding):
    tokens, e = 256, 8
    scores, valid = skewed(0, tokens, e), np.ones((2, tokens), bool)
    valid[1, :padding] = False
    scores[~valid] = 1e4
    plan = np.asarray(jax.nn.softmax(scores + offsets(scores, valid, 50), axis=-1))  # each token gives 1
    for g in range(2):
        real = plan[g, valid[g]]
        np.testing.assert_allclose(real.sum(0) * e / len(real), 1.0, atol=1e-3)
        np.testing.assert_allclose(real / len(real), oracle.plan(scores[g, valid[g]]), atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_of_many_tokens_no_expert_gets_a_tenth_more_than_its_share(k):
    tokens, e = 8192, 8
    scores, valid = skewed(1, tokens, e), np.ones((2, tokens), bool)

    def violation(experts):
        load = np.bincount(np.asarray(experts).ravel(), minlength=e)
        return load.max() / load.mean() - 1

    assert violation(chosen(scores + offsets(scores, valid, 50), scores, k)) < 0.1
    assert violation(chosen(scores, scores, k)) > 1.0


def test_large_logits_stay_finite_and_a_group_of_padding_too():
    scores = 1e4 * skewed(2, 16, 8)
    valid = np.zeros((2, 16), bool)
    valid[0] = True
    assert np.isfinite(offsets(scores, valid, 50)).all()


def test_rounding_decides_nothing_among_experts_with_the_same_share():
    """Of one token, and of copies of it: on another mesh logits differ in the last bits."""
    draw = np.random.default_rng(3)
    scores = np.repeat(draw.normal(size=(6, 1, 8)), 4, axis=1).astype(np.float32)
    valid = np.arange(4) < np.array([1, 4, 2, 3, 4, 1])[:, None]
    for _ in range(5):
        noisy = (scores * (1 + 1e-7 * draw.normal(size=scores.shape))).astype(np.float32)
        np.testing.assert_array_equal(
            np.asarray(chosen(noisy + offsets(noisy, valid, 50), noisy, 2))[valid],
            np.argsort(-scores, axis=-1)[..., :2][valid],
        )


@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_is_that_of_the_weights_alone(k):
    tokens, kernel, valid = data(1, "random", 12, 4)
    call = compiled(SinkhornRouter, 4, k, capacity=Capacity(None))
    experts = call(kernel, tokens, valid, jax.random.key(0))[0].experts

    def weights(kernel):
        logits = jnp.einsum("gsm,me->gse", tokens, kernel)
        gates = jax.nn.sigmoid(logits) if k == 1 else jax.nn.softmax(logits)
        return jnp.sum(jnp.take_along_axis(gates, experts, axis=-1) ** 2)

    actual = jax.grad(lambda w: jnp.sum(call(w, tokens, valid, jax.random.key(0))[0].weights ** 2))(kernel)
    np.testing.assert_allclose(actual, jax.grad(weights)(kernel), atol=1e-5)
    assert np.abs(actual).max() > 0.01


def test_no_token_chooses_an_expert_twice_without_numbers():
    none = jnp.full((1, 2, 4), jnp.nan)
    np.testing.assert_array_equal(chosen(none, none, 3)[0, 0], [0, 1, 2])


@pytest.mark.parametrize(("options", "said"), [({"iterations": 0}, "use 50"), ({"temperature": 0.0}, "above 0")])
def test_options_that_can_not_be_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        SinkhornRouter(M, 4, 2, **options, rngs=nnx.Rngs(0))
