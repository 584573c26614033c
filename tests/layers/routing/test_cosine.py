"""The cosine router against loops, and what directions alone promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, CosineRouter
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import cosine
from tests.oracles import top_k as oracle

SETTINGS = {
    "as tutel has it": ((12, 8, 2), Capacity(None), {}, np.log(2.0)),
    "clamped, tight": ((13, 3, 2), Capacity(0.6), {"renormalise": False, "priority": "gate"}, 9.0),
    "one token": ((1, 3, 3), Capacity(0.01, minimum=4), {"softmax": "after"}, -1.0),
}


def routed(tokens, kernel, valid, seed, e, k, log_temperature, rng=None, **options):
    """The router's, and the matrix P that it was given."""
    projection = np.random.default_rng(seed + 1).normal(size=(M, M)).astype(np.float32)
    call = compiled(CosineRouter, e, k, projection=M, **options)
    given = {"projection": projection, "temperature": np.full(1, log_temperature, np.float32)}
    return call(kernel, tokens, valid, rng, **given), projection


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options, log_temperature = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    rng = jax.random.key(0)
    (routing, logits), projection = routed(
        tokens, kernel, valid, seed, e, k, log_temperature, rng, capacity=capacity, **options
    )
    slots = capacity_of(capacity, s, e, k, training=True)
    expected = [np.array(cosine.logits(*(x.tolist() for x in (tokens[g], projection, kernel)), log_temperature))
                for g in range(G)]  # fmt: skip
    np.testing.assert_allclose(logits, expected, atol=2e-5 * min(np.exp(log_temperature), 100))  # P may cancel much
    groups = [oracle.route(np.asarray(logits[g], np.float64), k, slots, valid[g], **options) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, groups, scale=10.0)  # of logits up to 100


def test_lengths_have_no_say_and_no_logit_exceeds_the_temperature():
    tokens, kernel, valid = data(1, "random", 12, 8)
    plain, longer = (
        routed(scale * tokens, kernel * np.linspace(1, scale, 8), valid, 1, 8, 2, 50.0)[0] for scale in (1.0, 30.0)
    )
    np.testing.assert_array_equal(plain[0].experts, longer[0].experts)
    np.testing.assert_allclose(plain[1], longer[1], atol=1e-4)
    assert 50 < np.abs(plain[1]).max() <= 100.001


def test_the_temperature_starts_at_two_and_learns_until_it_is_clamped():
    tokens, kernel, valid = data(2, "random", 12, 8)
    start = CosineRouter(M, 8, 2, rngs=nnx.Rngs(0)).temperature[...]
    np.testing.assert_allclose(jnp.exp(start), 2.0, rtol=1e-6)

    def z(log_temperature):
        call = compiled(CosineRouter, 8, 2, projection=M)
        return call(kernel, tokens, valid, None, temperature=log_temperature)[0].losses["z"]

    assert float(jax.grad(z)(start)[0]) != 0
    assert float(jax.grad(z)(jnp.full(1, 5.0))[0]) == 0


def test_zero_tokens_and_zero_columns_have_finite_gradients():
    tokens, kernel, valid = data(3, "random", 12, 8)
    tokens[0, :3], kernel[:, 2] = 0, 0
    call = compiled(CosineRouter, 8, 2, projection=M)

    def loss(kernel, tokens):
        routing, logits = call(kernel, tokens, valid, None)
        return routing.losses["balance"] + jnp.sum(jnp.sin(routing.weights)), logits

    gradients, logits = jax.grad(loss, argnums=(0, 1), has_aux=True)(kernel, tokens)
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() < 1e3 for gradient in gradients)
    np.testing.assert_array_equal(np.asarray(logits)[0, :3], 0.0)
    np.testing.assert_array_equal(np.asarray(logits)[..., 2], 0.0)


def test_a_projection_to_nothing_is_refused():
    with pytest.raises(BadInput, match=r"projection = 0: .* use 256"):
        CosineRouter(M, 8, 2, projection=0, rngs=nnx.Rngs(0))
