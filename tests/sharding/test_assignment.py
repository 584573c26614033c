"""GShard's device assignments: each piece on the device that was named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh, shard
from gshardx.sharding.assignment import assigned_sharding

EIGHT = build_mesh(MeshConfig(expert=8))
CUBE = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
NONE = Mesh(np.empty((), dtype=object), ())
IN_ORDER = np.arange(8)
SHUFFLED = np.array([3, 1, 4, 0, 5, 7, 2, 6])


def holders(sharding, shape):
    """Device id by the start of its piece."""
    where = sharding.devices_indices_map(shape)
    return {tuple(cut.indices(n)[0] for cut, n in zip(at, shape, strict=True)): d.id for d, at in where.items()}


def assigned(ids, shape):
    piece = [size // parts for size, parts in zip(shape, ids.shape, strict=True)]
    return {tuple(int(i * p) for i, p in zip(at, piece, strict=True)): int(ids[at]) for at in np.ndindex(ids.shape)}


@pytest.mark.parametrize("ids", [IN_ORDER, SHUFFLED, IN_ORDER[::-1]])
def test_the_papers_example_lies_as_it_says_without_a_mesh(ids):
    x = jnp.arange(3.0 * 16 * 64).reshape(3, 16, 64)
    grid = ids.reshape(1, 2, 4)
    for out in (
        shard(x, grid),
        jax.jit(lambda x: shard(x, grid))(x),
        shard(jax.ShapeDtypeStruct(x.shape, x.dtype), grid),
    ):
        assert out.sharding.shard_shape(x.shape) == (3, 8, 16)
        assert holders(out.sharding, x.shape) == assigned(grid, x.shape)
    np.testing.assert_array_equal(shard(x, grid), x)


def test_inside_jit_an_assignment_need_not_have_the_shape_of_the_mesh():
    x, grid = jnp.arange(3.0 * 16 * 64).reshape(3, 16, 64), IN_ORDER.reshape(1, 2, 4)
    with jax.set_mesh(EIGHT):
        out = jax.jit(lambda x: shard(x, grid) * 1.0)(x)
        mixed = jax.jit(lambda x: shard(shard(x, grid) + 1, "time batch model"))(x)
    assert holders(out.sharding, x.shape) == assigned(grid, x.shape)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(mixed, x + 1)


@given(st.permutations(range(3)), st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2), (1, 8), (2, 1, 4)]))
def test_an_order_that_transposes_the_mesh_is_a_spec_of_it(order, shape):
    ids = IN_ORDER.reshape(2, 2, 2).transpose(order).reshape(shape)
    sharding = assigned_sharding(ids, [8] * len(shape), CUBE)
    assert sharding.mesh == CUBE
    assert holders(sharding, (8,) * len(shape)) == assigned(ids, [8] * len(shape))


def test_another_order_is_refused_under_a_mesh_and_the_proposal_is_taken():
    x, grid = jnp.ones((4, 8)), SHUFFLED.reshape(2, 4)
    with jax.set_mesh(CUBE):
        for place in (lambda: jax.jit(lambda x: shard(x, grid))(x), lambda: shard(x, grid)):
            with pytest.raises(
                BadInput, match=r"array \[4, 8\].*device order.*in the shape \[2, 4\], in the mesh's order"
            ):
                place()
        jax.jit(lambda x: shard(x, CUBE.device_ids.reshape(2, 4)))(x)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.ones((2, 4)), "holds float64, not device ids"),
        (IN_ORDER, "it has 1 dimensions and the tensor 2"),
        (np.array([[0, 1, 2, 3], [4, 5, 6, 6]]), "each of 8 devices once, and device 6 is there 2 times"),
        (np.arange(4).reshape(2, 2), "each of 8 devices once, and device 4 is there 0 times"),
        (np.array([[0, 1, 2, 3], [4, 5, 6, 9]]), "each of 8 devices once, and device 9 is unknown"),
        (IN_ORDER.reshape(1, 8), "dimension 1 = 12 does not divide into 8 pieces; pad it to 16"),
    ],
)
@pytest.mark.parametrize("mesh", [NONE, CUBE])
def test_a_wrong_assignment_is_told_what_would_work(ids, message, mesh):
    with pytest.raises(BadInput, match=message) as caught:
        assigned_sharding(ids, (6, 12), mesh, "w")
    assert str(caught.value).startswith(f"w [6, 12] (device assignment of shape {list(ids.shape)})")
    assert str(caught.value).endswith("the 8 device ids in the shape [2, 4] would work")


@settings(max_examples=50)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=4))
def test_what_an_error_proposes_is_accepted(shape):
    with pytest.raises(BadInput) as caught:
        assigned_sharding(np.zeros([1] * len(shape)), shape, NONE)
    proposed = re.search(r"in the shape (\[.*\]) would work", str(caught.value))
    if proposed:
        ids = IN_ORDER.reshape(eval(proposed[1]))
        assert isinstance(assigned_sharding(ids, shape, NONE), NamedSharding)
    else:
        assert np.prod([size & -size for size in shape]) < 8  # too few factors of two
        assert f"PartitionSpec({', '.join(['None'] * len(shape))}) would work" in str(caught.value)
