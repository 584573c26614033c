"""CompiledStep: compiled once for its shapes and places, and an error for any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.sharding import CompiledStep, MeshConfig, abstract_array, build_mesh, shard

MESH = build_mesh(MeshConfig(expert=8))


def abstract(shape=(8, 4), dtype=jnp.float32):
    return abstract_array(shape, dtype, ("batch", "model"), MESH)


def batch(shape=(8, 4), dtype=jnp.float32, axis="expert"):
    return jax.device_put(np.ones(shape, dtype), NamedSharding(MESH, PartitionSpec(axis)))


def test_it_computes_what_the_function_computes_and_traces_it_once():
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    step = CompiledStep(double, (abstract(),), MESH)
    for _ in range(3):
        np.testing.assert_array_equal(step(batch()), np.full((8, 4), 2.0))
    assert traced == [(8, 4)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: batch(shape=(16, 4)),
        lambda: batch(shape=(8, 5)),
        lambda: batch(dtype=jnp.int32),
        lambda: batch(axis=None),
        lambda: jax.device_put(np.ones((8, 4), np.float32), jax.devices()[0]),
    ],
    ids=["more rows", "wider", "another dtype", "another sharding", "one device"],
)
def test_it_refuses_another_shape_dtype_or_place_by_the_arguments_name(wrong):
    traced = []

    def add(state, tokens):
        traced.append(1)
        return state + tokens

    step = CompiledStep(add, (abstract(), abstract()), MESH)
    with pytest.raises((TypeError, ValueError), match="tokens"):
        step(batch(), wrong())
    assert len(traced) == 1
    step(batch(), batch())  # and goes on with the right ones


def test_it_refuses_another_number_of_arguments():
    with pytest.raises(TypeError):
        CompiledStep(jnp.add, (abstract(), abstract()), MESH)(batch())


def test_it_does_not_fall_back_to_compiling_for_another_tree():
    step = CompiledStep(lambda tree: tree["a"], ({"a": abstract()},), MESH)
    with pytest.raises(TypeError):
        step({"b": batch()})


def test_a_donated_argument_is_used_up_and_the_others_stay():
    step = CompiledStep(lambda state, x: state + x, (abstract(), abstract()), MESH, donate=(0,))
    state, x = batch(), batch()
    new = step(state, x)
    assert state.is_deleted()
    assert not x.is_deleted()
    assert float(step(new, x).sum()) == 3 * 32


def test_without_donation_nothing_is_used_up():
    x = batch()
    CompiledStep(lambda x: x + 1, (abstract(),), MESH)(x)
    assert not x.is_deleted()


def test_annotations_inside_refer_to_its_mesh_whether_the_caller_sets_one_or_not():
    step = CompiledStep(lambda x: shard(x.T, "model batch"), (abstract(),), MESH)
    assert step(batch()).sharding.is_equivalent_to(NamedSharding(MESH, PartitionSpec(None, "expert")), 2)


def test_outputs_lie_where_they_are_asked_to():
    whole = NamedSharding(MESH, PartitionSpec())
    assert CompiledStep(lambda x: x, (abstract(),), MESH, out_shardings=whole)(batch()).sharding.is_fully_replicated


def test_its_hlo_can_be_read_and_counted():
    short = CompiledStep(lambda x: x + 1, (abstract(),), MESH)
    long = CompiledStep(lambda x: jnp.sort(x @ x.T, axis=0).sum(), (abstract(),), MESH)
    assert short.hlo.startswith("HloModule")
    assert 0 < short.hlo_instructions < long.hlo_instructions
    assert "all-reduce" in long.hlo or "all-gather" in long.hlo
    assert "all-reduce" not in short.hlo
