"""Losses of targets against NumPy, and the coefficients of auxiliary losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.train.objective import adapt_coefficient


def test_the_adapted_coefficient_follows_skyworks_numbers():
    assert float(adapt_coefficient(jnp.float32(0.005), jnp.float32(0.01))) == pytest.approx(0.00497, rel=1e-5)
    assert float(adapt_coefficient(jnp.float32(0.005), jnp.float32(0.5))) == pytest.approx(0.00505, rel=1e-5)
    both = adapt_coefficient(jnp.asarray([1.0, 0.0]), jnp.asarray([0.2, 0.3]), slope=0.5, highest=0.12, decay=0.75)
    np.testing.assert_allclose(both, [0.775, 0.03], rtol=1e-5)
