"""The blocked product against one row at a time, for even, skewed and empty groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.blocked import BLOCK, blocked_matmul
from gshardx.layers.grouped import grouped_matmul

ROWS, IN, OUT, EXPERTS = 3 * BLOCK + 5, 6, 4, 5
LOADS = {
    "even": [ROWS // EXPERTS] * EXPERTS,
    "one expert": [0, 0, ROWS, 0, 0],
    "whole blocks": [BLOCK, 0, 2 * BLOCK, 0, 0],
    "one row over": [BLOCK + 1, 1, BLOCK - 1, 0, 2],
    "nothing": [0] * EXPERTS,
    "first and last": [7, 0, 0, 0, 11],
}


def by_loops(rows, weights, sizes):
    out, at = np.zeros((ROWS, OUT)), 0
    for expert, size in enumerate(sizes):
        for row in range(at, at + size):
            out[row] = rows[row] @ weights[expert]
        at += size
    return out


@pytest.mark.parametrize("name", LOADS)
def test_value_and_gradients_are_those_of_the_loops(name):
    draw, sizes = np.random.default_rng(0), LOADS[name]
    rows, weights, pull = (draw.normal(size=s) for s in ((ROWS, IN), (EXPERTS, IN, OUT), (ROWS, OUT)))
    used = np.arange(ROWS) < sum(sizes)
    out, vjp = jax.vjp(
        lambda r, w: blocked_matmul(r, w, jnp.asarray(sizes, jnp.int32)),
        jnp.asarray(rows, jnp.float32),
        jnp.asarray(weights, jnp.float32),
    )
    np.testing.assert_allclose(out, by_loops(rows, weights, sizes), atol=1e-5)
    d_rows, d_weights = vjp(jnp.asarray(pull, jnp.float32))
    expert = np.repeat(np.arange(EXPERTS), sizes)
    expected_rows, expected_weights = np.zeros_like(rows), np.zeros_like(weights)
    for row in np.flatnonzero(used):
        expected_rows[row] = weights[expert[row]] @ pull[row]
        expected_weights[expert[row]] += np.outer(rows[row], pull[row])
    np.testing.assert_allclose(d_rows, expected_rows, atol=1e-5)
    np.testing.assert_allclose(d_weights, expected_weights, atol=1e-4)


def test_a_row_is_the_same_to_the_bit_wherever_it_stands_and_whatever_its_neighbours():
    draw = np.random.default_rng(1)
    rows, weights = draw.normal(size=(ROWS, 32)).astype(np.float32), draw.normal(size=(EXPERTS, 32, 48))
    weights = jnp.asarray(weights, jnp.float32)
    product = jax.jit(blocked_matmul)
    alone = product(jnp.asarray(rows), weights, jnp.asarray([0, ROWS, 0, 0, 0], jnp.int32))
    for shift in (1, 7, 31, 60):
        moved = np.concatenate([draw.normal(size=(shift, 32)).astype(np.float32), rows[: ROWS - shift]])
        found = product(jnp.asarray(moved), weights, jnp.asarray([shift // 2, ROWS - shift // 2, 0, 0, 0], jnp.int32))
        np.testing.assert_array_equal(found[shift:], alone[: ROWS - shift])


def test_cpus_multiply_in_blocks_and_gpus_are_warned_of_a_slow_kernel(monkeypatch):
    rows, weights = jnp.ones((4, 2)), jnp.ones((2, 2, 3))
    sizes = jnp.asarray([1, 3], jnp.int32)

    def traced():
        return str(jax.make_jaxpr(lambda *x: grouped_matmul(*x))(rows, weights, sizes))

    assert "ragged_dot" not in traced()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="pip install tokamax"):
        assert "ragged_dot" in traced()
