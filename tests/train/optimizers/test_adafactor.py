"""Adafactor's rows and columns are of each matrix, whatever dimensions are the largest."""

import jax
import numpy as np
import optax

from gshardx.config import OptimizerConfig
from gshardx.train.optimizers.adafactor import adafactor, scale_by_factored_rms
from tests.oracles.optimizers import rms
from tests.train.optimizers.stacks import AXES, PARAMETERS, drawn, units


def state_shapes(tree):
    return {name: None if isinstance(held, optax.MaskedNode) else held.shape for name, held in tree.items()}


def test_it_keeps_a_value_for_each_row_and_column_and_no_first_moment():
    factored, *rest = adafactor(OptimizerConfig(beta1=0.0), AXES).init(drawn(0))
    assert jax.tree.leaves(rest) == []
    rows, columns, whole = map(state_shapes, (factored.rows, factored.columns, factored.whole))
    assert (rows["experts"], columns["experts"], whole["experts"]) == ((2, 4, 16, 1), (2, 4, 1, 24), None)
    assert (rows["queries"], columns["queries"]) == ((2, 16, 1, 1), (2, 1, 2, 4))
    assert (rows["norm"], columns["norm"], whole["norm"]) == (None, None, (2, 16))
    matrices = [p for p in PARAMETERS.values() if len(p.unit) == 2]
    expected = sum(np.prod(p.shape) // np.prod(p.unit) * sum(p.unit) for p in matrices)
    expected += sum(np.prod(p.shape) for p in PARAMETERS.values() if len(p.unit) == 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(factored)) == expected + 1  # and the step


def test_more_layers_than_width_are_factored_like_any_others():
    """Ten layers of a 2 x 3 matrix: optax's own rule would take the layers for rows."""
    axes = {"w": ("layer", "embed", "hidden")}
    g = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)

    def update(part):
        rule = scale_by_factored_rms(axes)
        return jax.jit(rule.update)({"w": part}, rule.init({"w": part}))[0]["w"]

    alone = np.concatenate([update(g[at : at + 1]) for at in range(10)])
    np.testing.assert_allclose(update(g), alone, rtol=1e-6)


def test_it_is_optax_s_where_that_takes_the_same_dimensions():
    """One matrix, 20 steps."""
    axes, draw = {"w": ("embed", "hidden")}, np.random.default_rng(0)
    params = {"w": draw.normal(size=(128, 130)).astype(np.float32)}
    mine = adafactor(OptimizerConfig(beta1=0.0), axes)
    theirs = optax.adafactor(learning_rate=None)  # which turns the sign
    states, steps = [mine.init(params), theirs.init(params)], [jax.jit(mine.update), jax.jit(theirs.update)]
    for _ in range(20):
        g = {"w": draw.normal(size=(128, 130)).astype(np.float32)}
        one, states[0] = steps[0](g, states[0], params)
        other, states[1] = steps[1](g, states[1], params)
        np.testing.assert_allclose(one["w"], -other["w"], rtol=1e-5, atol=1e-7)


def test_each_expert_is_clipped_and_scaled_by_itself():
    """After a quiet step the first expert's gradient jumps; its update is held to its own size, and no other's."""
    params, rule = drawn(0), adafactor(OptimizerConfig(beta1=0.0), AXES)
    params["experts"][0, 1] *= 10
    quiet, loud = drawn(1), drawn(2)
    loud["experts"][0, 0] *= 1000
    step = jax.jit(rule.update)
    _, state = step(quiet, rule.init(params), params)
    update = units("experts", step(loud, state, params)[0]["experts"])
    weights = units("experts", params["experts"])
    sizes = [rms(piece) / rms(own) for piece, own in zip(update, weights, strict=True)]
    np.testing.assert_allclose(sizes[0], 1.0, rtol=1e-5)
    assert all(0.8 < size <= 1.0001 for size in sizes)
