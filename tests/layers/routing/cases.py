"""Routers compiled once a setting, data that try them, and the comparison with the loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from tests.oracles import choice as oracle

G, M = 2, 4
DRAWN = {
    "seed": st.integers(0, 2**32 - 1),
    "kind": st.sampled_from(["random", "ties", "twins", "one expert"]),
    "padding": st.sampled_from(["none", "some", "some", "all"]),
}


@functools.cache
def compiled(make, *numbers, **options):
    """``call(kernel, tokens, valid, rng, *state, **parameters) -> (routing, logits of the tokens)``.

    Parameters that are not given are as they are drawn; ``norm_scale`` is that of ``norm``.
    """
    made = make(M, *numbers, **options, rngs=nnx.Rngs(0))
    graph, params = nnx.split(made)

    @jax.jit
    def call(kernel, tokens, valid, rng, *state, **others):
        given = {"kernel": kernel, **others}
        router = nnx.merge(graph, jax.tree.map_with_path(lambda path, leaf: given.get(_name(path), leaf), params))
        ids = jnp.zeros(tokens.shape[:2], jnp.int32)  # some want to read them
        return router.reading(ids)(tokens, valid, rng, *state), router.logits(tokens)

    return call


def _name(path):
    return "_".join(step.key for step in path if hasattr(step, "key"))


def data(seed, kind, s, e, g=G, padding="none"):
    """Tokens ``[g, s, m]``, a kernel and the mask.

    kind "ties": all experts alike; "twins": each even expert has an equal neighbour; "one expert": the last one is
    everybody's first choice.
    """
    draw = np.random.default_rng(seed)
    tokens = draw.normal(size=(g, s, M)).astype(np.float32)
    kernel = draw.normal(size=(M, e)).astype(np.float32)
    if kind == "ties":
        kernel *= 0
    elif kind == "twins":
        kernel[:, 1::2] = kernel[:, : e - 1 : 2]
    elif kind == "one expert":
        tokens[..., 0] = 1 + 0.5 * draw.random((g, s))
        kernel *= 0.1
        kernel[0, -1] += 4
    share = {"none": 1.0, "some": 0.7, "all": 0.0}[padding]
    return tokens, kernel, draw.random((g, s)) < share


def check(routing, groups, scale=1.0):
    """The router's groups against the oracle's."""
    for g, expected in enumerate(groups):
        real = expected.wanted.any(-1)
        np.testing.assert_array_equal(np.asarray(routing.experts[g])[real], expected.experts[real])
        np.testing.assert_array_equal(np.asarray(routing.slots[g])[expected.wanted], expected.slots[expected.wanted])
        np.testing.assert_array_equal(routing.keep[g], expected.keep)
        np.testing.assert_allclose(routing.weights[g], expected.weights, atol=1e-6 * scale)
    tokens = [group.tokens for group in groups]
    assert set(routing.losses) == set(groups[0].losses)
    for name, loss in routing.losses.items():
        expected = sum(group.losses[name] * group.tokens for group in groups) / max(sum(tokens), 1)
        np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-5)


def capacity_of(capacity, s, e, k, training):
    """The slots that the paper's formula gives for a router's ``Capacity``."""
    factor = capacity.factor if training else capacity.evaluation
    return oracle.slots_per_expert(s, e, k, factor, capacity.rounding, capacity.minimum)
