"""Rematerialisation changes memory and time, and no number."""

import dataclasses

import jax
import numpy as np
import pytest

from gshardx.layers.remat import REMAT
from gshardx.sharding import MeshConfig
from tests.models.test_decoder import model, train

POLICIES = [name for name in REMAT if name != "none"]


@pytest.mark.sweep
@pytest.mark.parametrize("remat", POLICIES)
def test_every_policy_gives_the_same_loss_to_the_bit(remat):
    """The first step's loss; gradients, which XLA may fuse otherwise, to rounding."""
    plain, params = train(model(), MeshConfig(data=2, expert=2), steps=2)
    again, changed = train(dataclasses.replace(model(), remat=remat), MeshConfig(data=2, expert=2), steps=2)
    assert again[0][0] == plain[0][0]
    np.testing.assert_allclose(again, plain, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, changed)
