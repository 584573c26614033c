"""Numbers drawn in one dimension."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers.routing.draw import drawn
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import CompiledStep, MeshConfig, abstract_array, build_mesh, shard


@pytest.mark.parametrize("draw", [jax.random.uniform, jax.random.gumbel, partial(jax.random.uniform, minval=0.9)])
@pytest.mark.parametrize("shape", [(4, 4, 2), (3, 5), (7,)])
def test_drawn_in_one_dimension_are_the_same_numbers(draw, shape):
    rng = jax.random.key(3)
    np.testing.assert_array_equal(drawn(draw, rng, shape), draw(rng, shape))


def test_on_tpus_they_send_nothing_for_as_many_groups_as_tokens():
    """Drawn along two equal dimensions they do (jax 0.10): that is why there is one."""
    pytest.importorskip("libtpu")
    prepare("v5e:2x4")
    mesh = build_mesh(MeshConfig(expert=8), open_topology("v5e:2x4").devices)
    rng = abstract_array((2,), jnp.uint32, ((),), mesh)
    sent = {}
    for groups in (16, 32):
        weights = abstract_array((groups, 16, 2), jnp.float32, ("group", "token", "choice"), mesh)
        for uniform in (jax.random.uniform, partial(drawn, jax.random.uniform)):

            def accept(rng, weights, uniform=uniform):
                return uniform(jax.random.wrap_key_data(rng), weights.shape) < shard(weights, "group token choice")

            found = CompiledStep(accept, (rng, weights), mesh).collectives
            sent[groups, uniform is jax.random.uniform] = len(found)
    assert sent == {(16, True): 1, (16, False): 0, (32, True): 0, (32, False): 0}
