"""Losses of targets against NumPy, and the coefficients of auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import TrainConfig
from gshardx.models.build import Variables, blueprint
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.train.objective import Batch, adapt_coefficient, token_losses
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, model


def test_the_adapted_coefficient_follows_skyworks_numbers():
    assert float(adapt_coefficient(jnp.float32(0.005), jnp.float32(0.01))) == pytest.approx(0.00497, rel=1e-5)
    assert float(adapt_coefficient(jnp.float32(0.005), jnp.float32(0.5))) == pytest.approx(0.00505, rel=1e-5)
    both = adapt_coefficient(jnp.asarray([1.0, 0.0]), jnp.asarray([0.2, 0.3]), slope=0.5, highest=0.12, decay=0.75)
    np.testing.assert_allclose(both, [0.775, 0.03], rtol=1e-5)


@pytest.fixture(scope="module")
def case():
    """A plan, its variables, a batch, and the logits that it gives, in float64."""
    plan = blueprint(model(layers=2), VOCAB, build_mesh(MeshConfig()))
    variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = Batch(tokens, targets, ones, positions, draw.integers(0, 2, ones.shape).astype(np.float32))
    decoder, kept = plan.bind(variables.params), []

    def run():
        logits = type(decoder).logits
        try:
            type(decoder).logits = lambda self, hidden: kept.append(logits(self, hidden)) or kept[-1]
            token_losses(plan, variables, batch, None, TrainConfig())
        finally:
            type(decoder).logits = logits
        return kept[-1]

    return plan, variables, batch, np.asarray(run(), np.float64)


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.02)])
def test_smoothing_and_z_loss_equal_their_formulas(case, smoothing, z):
    plan, variables, batch, logits = case
    config = TrainConfig(label_smoothing=smoothing, z_loss=z)
    found = jax.jit(lambda v: token_losses(plan, v, batch, None, config)[0])(variables)
    total = np.log(np.exp(logits).sum(-1))
    logp = logits - total[..., None]
    smooth = np.full_like(logp, smoothing / VOCAB)
    np.put_along_axis(smooth, batch.targets[..., None], 1 - smoothing + smoothing / VOCAB, axis=-1)
    nats = -np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    minimised = -(smooth * logp).sum(-1) + z * total**2
    assert float(found.nats) == pytest.approx((nats * batch.weights).sum(), rel=1e-5)
    assert float(found.minimised) == pytest.approx((minimised * batch.weights).sum(), rel=1e-5)
