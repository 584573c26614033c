"""CompiledStep: compiled once for its shapes and places, and an error for any other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.sharding import (
    ArgumentChanged,
    CompiledStep,
    MeshConfig,
    abstract_array,
    build_mesh,
    count_compiles,
    reshard,
    shard,
)
from gshardx.sharding.compile import ArgumentUsedUp

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
    with pytest.raises(ArgumentChanged, match="add was compiled once and does not compile again: tokens"):
        step(batch(), wrong())
    assert len(traced) == 1
    step(batch(), batch())  # and goes on with the right ones


def test_it_refuses_another_number_of_arguments():
    step = CompiledStep(lambda state, tokens: state + tokens, (abstract(), abstract()), MESH)
    with pytest.raises(ArgumentChanged, match=r"takes 2 arguments \(state, tokens\) and got 1"):
        step(batch())


def test_it_does_not_fall_back_to_compiling_for_another_tree():
    step = CompiledStep(lambda tree: tree["a"], ({"a": abstract()},), MESH)
    with count_compiles() as count, pytest.raises(ArgumentChanged, match=r"tree has another structure: .*'b'"):
        step({"b": batch()})
    assert count.compiled == []


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict[str, Any]
    step: Any


def update(state, tokens):
    w = state.params["w"]
    return State({"w": w + (tokens @ w).sum()}, state.step + 1), tokens.sum()


def updated(**options):
    place = NamedSharding(MESH, PartitionSpec())
    state = State({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=place)},
                  jax.ShapeDtypeStruct((), jnp.int32, sharding=place))  # fmt: skip
    return CompiledStep(update, (state, abstract()), MESH, **options)


def state(w=(4, 4), dtype=jnp.float32, spec=(), step=0):
    place = NamedSharding(MESH, PartitionSpec(*spec))
    whole = NamedSharding(MESH, PartitionSpec())
    return State({"w": jax.device_put(np.ones(w, dtype), place)}, jax.device_put(np.int32(step), whole))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"w": (4, 8)}, r"state\.params\['w'\] is float32\[4, 8\]; it was float32\[4, 4\]"),
        ({"dtype": jnp.int32}, r"state\.params\['w'\] is int32\[4, 4\]; it was float32\[4, 4\]"),
        ({"w": (8, 4), "spec": ("expert",)}, r"state\.params\['w'\] is float32\[8, 4\]"),
    ],
    ids=["shape", "dtype", "sharding and shape"],
)
def test_what_changed_is_named_by_its_path(wrong, told):
    step = updated()
    with count_compiles() as count, pytest.raises(ArgumentChanged, match=f"update was compiled once.*: {told}"):
        step(state(**wrong), batch())
    assert count.compiled == []


def test_a_place_that_changed_is_named_with_both_places():
    step = updated()
    with pytest.raises(ArgumentChanged, match=r"tokens float32\[8, 4\] lies at P.*\(\); it was P.*'expert'"):
        step(state(), jax.device_put(np.ones((8, 4), np.float32), NamedSharding(MESH, PartitionSpec())))


def test_an_argument_that_was_used_up_is_named():
    """Left to itself, jax 0.10 ends the process here."""
    step = updated(donate=(0,))
    first = state()
    step(first, batch())
    with pytest.raises(ArgumentUsedUp, match=r"update: state\.params\['w'\] was donated to an earlier call; pass on"):
        step(first, batch())


def test_it_knows_its_shardings_and_donation():
    step = updated(donate=(0,))
    assert (step.name, step.donated) == ("update", (0,))
    of_state, of_tokens = step.input_shardings
    assert of_tokens.is_equivalent_to(NamedSharding(MESH, PartitionSpec("expert")), 2)
    assert of_state.params["w"].is_fully_replicated
    new, total = step.output_shardings
    assert new.params["w"].is_fully_replicated
    assert total.is_fully_replicated


def test_it_knows_its_memory():
    kept, donating = updated().memory, updated(donate=(0,)).memory
    w, tokens = 4 * 4 * 4, 8 * 4 * 4 // 8
    assert kept.arguments == donating.arguments == w + 4 + tokens
    assert kept.aliased == 0
    assert donating.aliased == w + 4
    assert kept.outputs >= w + 4 + 4
    assert kept.peak - donating.peak == pytest.approx(w + 4, abs=64)
    assert kept.peak == kept.arguments + kept.outputs + kept.temporaries + kept.program


def test_it_knows_its_flops_and_what_it_sends():
    def exchange(x):
        return reshard(x, "group model", "model expert") @ jnp.ones((16, 16))

    step = CompiledStep(exchange, (abstract_array((8, 16), jnp.float32, ("group", "model"), MESH),), MESH)
    assert step.flops * 8 >= 2 * 8 * 16 * 16
    assert next((one.op, one.axes, one.count) for one in step.collectives) == ("all-to-all", ("expert",), 1)


def test_a_loaded_step_gives_the_same_numbers_and_compiles_nothing():
    step = updated(donate=(0,))
    data = step.serialize()
    expected, total = step(state(), batch())
    first, second = (jax.block_until_ready((state(), batch())) for _ in range(2))
    with count_compiles() as count:
        loaded = CompiledStep.deserialize(data, MESH)
        new, again = loaded(*first)
    assert count.compiled == []
    np.testing.assert_array_equal(new.params["w"], expected.params["w"])
    assert float(again) == float(total)
    assert first[0].params["w"].is_deleted()
    assert (loaded.name, loaded.donated) == ("update", (0,))
    assert (loaded.hlo_instructions, loaded.flops) == (step.hlo_instructions, step.flops)
    with pytest.raises(ArgumentChanged, match=r"state\.params\['w'\]"):
        loaded(state(w=(4, 8)), second[1])


def test_a_step_that_came_from_the_persistent_cache_can_be_written_too(tmp_path):
    """XLA's CPU executables can be written once, so it is compiled again for that."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        for _ in range(2):
            step = CompiledStep(lambda x: jnp.tanh(x.T @ x).sum(), (abstract(),), MESH)
            loaded = CompiledStep.deserialize(step.serialize(), MESH)
            np.testing.assert_allclose(loaded(batch()), 16.0, rtol=1e-5)
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="keep the bytes"):
        loaded.serialize()


def test_times_are_seconds():
    step = updated()
    assert 0 < step.lower_seconds < 60
    assert 0 < step.compile_seconds < 60
