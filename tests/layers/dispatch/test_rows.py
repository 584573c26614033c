"""spread and collect move rows as loops do, and are each other's transposes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.dispatch.rows import collect, inverse, spread

G, S, K, N, M = 2, 5, 3, 12, 4


def problem(seed):
    """Each choice has a place of its own or none; some places stay empty."""
    draw = np.random.default_rng(seed)
    slot = np.stack([draw.permutation(S * K)[: S * K].reshape(S, K) for _ in range(G)])
    slot = np.where(slot < N - 2, slot, N)
    tokens, rows = draw.normal(size=(G, S, M)), draw.normal(size=(G, N, M))
    weights = draw.normal(size=(G, S, K))
    return (jnp.asarray(x, jnp.float32) for x in (tokens, rows, weights)), jnp.asarray(slot, jnp.int32)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_go_where_loops_put_them(weighted):
    (tokens, rows, weights), slot = problem(0)
    source = inverse(slot, N)
    there = spread(tokens, weights if weighted else None, slot, source)
    back = collect(rows, weights if weighted else None, slot, source)
    expected_there, expected_back = np.zeros((G, N, M)), np.zeros((G, S, M))
    for g in range(G):
        for s in range(S):
            for k in range(K):
                at, w = int(slot[g, s, k]), float(weights[g, s, k]) if weighted else 1.0
                if at < N:
                    assert int(source[g, at]) == s * K + k
                    expected_there[g, at] = w * tokens[g, s]
                    expected_back[g, s] += w * rows[g, at]
    assert (np.asarray(source) == S * K).sum() == (expected_there == 0).all(-1).sum() > 0
    np.testing.assert_allclose(there, expected_there, atol=1e-6)
    np.testing.assert_allclose(back, expected_back, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_one_hot_form(weighted):
    (tokens, rows, weights), slot = problem(1)
    source, one_hot = inverse(slot, N), jax.nn.one_hot(slot, N)
    used = weights if weighted else jnp.ones_like(weights)

    def by_one_hot(tokens, rows, weights):
        there = jnp.einsum("gskn,gsk,gsm->gnm", one_hot, weights, tokens)
        back = jnp.einsum("gskn,gsk,gnm->gsm", one_hot, weights, rows)
        return jnp.sum(jnp.sin(there)) + jnp.sum(jnp.cos(back))

    def by_index(tokens, rows, weights):
        weights = weights if weighted else None
        there, back = spread(tokens, weights, slot, source), collect(rows, weights, slot, source)
        return jnp.sum(jnp.sin(there)) + jnp.sum(jnp.cos(back))

    expected = jax.grad(by_one_hot, (0, 1, 2))(tokens, rows, used)
    actual = jax.grad(by_index, (0, 1, 2))(tokens, rows, used)
    for a, b in zip(actual[: 2 + weighted], expected, strict=False):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_gradient_is_a_scatter_of_rows():
    (tokens, rows, weights), slot = problem(2)

    def loss(tokens, rows, weights):
        source = inverse(slot, N)
        return jnp.sum(spread(tokens, weights, slot, source)) + jnp.sum(collect(rows, weights, slot, source))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(tokens, rows, weights))
    scattered = re.findall(r":(\w+)\[[\d,]*\] = scatter", jaxpr)
    assert scattered
    assert set(scattered) == {"i32"}, "only the index is inverted by a scatter"
