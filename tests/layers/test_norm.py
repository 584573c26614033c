"""Norms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gshardx.layers import LayerNorm, RMSNorm


def test_a_layer_norm_is_the_papers_formula_whatever_the_type():
    norm = LayerNorm(6, epsilon=0.1, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    x, scale, bias = draw.normal(3.0, 2.0, (2, 5, 6)), draw.normal(size=6), draw.normal(size=6)
    norm.scale.set_value(jnp.asarray(scale, jnp.float32))
    norm.bias.set_value(jnp.asarray(bias, jnp.float32))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=2e-6)
    low = norm(jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert norm(jnp.asarray(x, jnp.bfloat16), "float32").dtype == jnp.float32
    # An offset that is large beside the deviation costs no digits that squares would.
    np.testing.assert_allclose(norm(jnp.asarray(x + 4096, jnp.float32)), expected, atol=2e-3)


def test_a_new_layer_norm_is_a_new_rms_norm_of_what_has_no_mean():
    x = jax.random.normal(jax.random.key(0), (4, 8))
    x = x - x.mean(-1, keepdims=True)
    one, other = (kind(8, rngs=nnx.Rngs(0))(x) for kind in (LayerNorm, RMSNorm))
    np.testing.assert_allclose(one, other, atol=1e-6)
