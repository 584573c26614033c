"""What is drawn for a row depends on the row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.layers.draws import draw, dropout, folded, group_keys, row_keys
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import CompiledStep, MeshConfig, abstract_array, build_mesh, shard

ROWS = row_keys(jax.random.key(0), 8)


def raw(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_row_draws_the_same_in_any_company():
    whole = draw(jax.random.uniform, ROWS, (8, 3, 2))
    for rows in (slice(0, 4), slice(1, 8, 3)):
        part = draw(jax.random.uniform, ROWS[rows], (len(ROWS[rows]), 3, 2))
        np.testing.assert_array_equal(part, whole[rows])
    assert len(np.unique(whole)) == whole.size


def test_one_key_gives_each_row_its_own():
    np.testing.assert_array_equal(raw(row_keys(jax.random.key(0), 3)), raw(ROWS[:3]))
    np.testing.assert_array_equal(raw(row_keys(jax.random.PRNGKey(0), 3)), raw(ROWS[:3]))
    assert row_keys(ROWS, 8) is ROWS
    with pytest.raises(BadInput, match=r"keys of shape \(8,\) for 4 rows; pass one key, or one for each row"):
        row_keys(ROWS, 4)
    assert len(np.unique(raw(ROWS), axis=0)) == 8


@pytest.mark.parametrize(("t", "s"), [(8, 8), (8, 4), (8, 2), (4, 8), (4, 16), (6, 4), (12, 8)])
def test_a_group_has_the_key_of_where_it_starts(t, s):
    starts = range(0, 8 * t, s)
    expected = [raw(folded(ROWS[start // t], start % t)) for start in starts]
    keys = raw(group_keys(ROWS, t, s))
    np.testing.assert_array_equal(keys, expected)
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_dropout_keeps_the_mean_and_drops_the_share():
    x = jnp.ones((8, 64, 64), jnp.bfloat16)
    out = np.asarray(dropout(x, ROWS, 0.25), np.float32)
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert set(np.unique(out)) == {0.0, np.float32(jnp.bfloat16(4 / 3))}
    assert dropout(x, None, 0.25) is x
    assert dropout(x, ROWS, 0.0) is x


@pytest.mark.parametrize("groups", [16, 32])
def test_tpus_send_nothing_to_draw(groups):
    """Drawn with one key along as many groups as tokens they do: XLA takes both counts for one (jax 0.10)."""
    pytest.importorskip("libtpu")
    prepare("v5e:2x4")
    mesh = build_mesh(MeshConfig(expert=8), open_topology("v5e:2x4").devices)
    rng = abstract_array((2,), jnp.uint32, ((),), mesh)
    weights = abstract_array((groups, 16, 2), jnp.float32, ("group", "token", "choice"), mesh)

    def accept(rng, weights):
        keys = group_keys(row_keys(rng, groups), 16, 16)
        return draw(jax.random.uniform, keys, weights.shape) < shard(weights, "group token choice")

    def with_one_key(rng, weights):
        coins = jax.random.uniform(jax.random.wrap_key_data(rng), weights.shape)
        return coins < shard(weights, "group token choice")

    assert CompiledStep(accept, (rng, weights), mesh).collectives == []
    assert len(CompiledStep(with_one_key, (rng, weights), mesh).collectives) == (groups == 16)
