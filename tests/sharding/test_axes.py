"""Logical axes: where they go, and what is said when they cannot go there."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding import (
    RULES,
    MeshConfig,
    abstract_array,
    build_mesh,
    partition_spec,
    split,
    variable_axes,
    variable_spec,
)

EIGHT = build_mesh(MeshConfig(expert=8))
CUBE = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
ONE = build_mesh(MeshConfig())


def complaint(names, shape, mesh, **more):
    with pytest.raises(BadInput) as caught:
        partition_spec(names.split(), shape, mesh, **more)
    return str(caught.value)


def test_there_are_at_most_twenty_rules_and_all_speak_of_axes_that_a_mesh_has():
    assert len(RULES) <= 20
    assert {axis for axes in RULES.values() for axis in axes} <= set(MeshConfig().shape)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        ("batch time model", (8, 16, 32), PartitionSpec(("data", "expert"), None, None)),
        ("batch time heads head_dim", (8, 16, 4, 32), PartitionSpec(("data", "expert"), None, "tensor", None)),
        ("expert expert_group slot model", (4, 2, 3, 5), PartitionSpec("expert", "data", None, None)),
        ("experts_here group slot model", (3, 4, 5, 6), PartitionSpec(None, ("data", "expert"), None, None)),
        ("layer expert embed hidden", (3, 4, 5, 6), PartitionSpec(None, "expert", None, "tensor")),
        ("embed router", (5, 7), PartitionSpec(None, None)),
        ("", (), PartitionSpec()),
    ],
)
def test_each_name_goes_to_the_axes_of_its_rule_that_have_several_devices(names, shape, expected):
    spec = partition_spec(names.split(), shape, CUBE)
    assert NamedSharding(CUBE, spec).is_equivalent_to(NamedSharding(CUBE, expected), len(shape))
    assert "fsdp" not in str(spec)  # of size 1


def test_on_one_device_nothing_is_split_and_nothing_need_divide():
    assert partition_spec(("batch", "time", "hidden"), (7, 5, 3), ONE) == PartitionSpec(None, None, None)


def test_two_names_may_share_an_axis_of_one_device():
    assert partition_spec(("group", "expert"), (3, 3), ONE) == PartitionSpec(None, None)
    assert partition_spec(("group", "embed"), (4, 3), CUBE)[1] is None


def test_axes_that_a_mesh_lacks_are_left_out():
    only_data = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = partition_spec(("batch", "expert", "hidden"), (8, 3, 3), only_data)
    assert NamedSharding(only_data, spec).shard_shape((8, 3, 3)) == (1, 3, 3)


def test_a_mesh_that_nobody_owns_will_do():
    mesh = AbstractMesh((4, 512), ("data", "expert"))
    spec = partition_spec(("group", "token"), (2048, 5), mesh)
    assert NamedSharding(mesh, spec).shard_shape((2048, 5)) == (1, 5)


@pytest.mark.parametrize(("wrong", "nearest"), [("modle", "model"), ("experts", "expert"), ("Batch", "batch")])
def test_an_unknown_axis_names_the_nearest(wrong, nearest):
    message = complaint(f"time {wrong}", (4, 8), EIGHT, tensor="dense.kernel")
    assert f"dense.kernel [4, 8] (time {wrong})" in message
    assert f"no rule for axis '{wrong}'; did you mean '{nearest}'?" in message


@pytest.mark.parametrize("names", ["batch", "batch time model"])
def test_a_name_too_few_or_too_many_is_counted(names):
    message = complaint(names, (8, 16), EIGHT, tensor="x")
    assert f"x [8, 16] ({names}): {len(names.split())} axis names for 2 dimensions" in message


def test_two_dimensions_on_one_mesh_axis_are_both_named():
    message = complaint("group token expert", (8, 4, 8), EIGHT, tensor="dispatch")
    assert "dispatch [8, 4, 8] (group token expert)" in message
    assert "group and expert both live on mesh axis 'expert'" in message
    assert message.endswith("PartitionSpec('expert', None, None) would work")


@pytest.mark.parametrize(("names", "shape", "size"), [("group time", (6, 3), 6), ("hidden group", (4, 12), 12)])
def test_a_dimension_that_does_not_divide_names_sizes_that_do(names, shape, size):
    message = complaint(names, shape, EIGHT, tensor="x")
    assert f"x {list(shape)} ({names}): group = {size} does not divide over mesh axis expert = 8" in message
    fits = [int(number) for number in re.findall(r"\d+", message.rsplit("use a mesh axis of", 1)[1])]
    assert fits
    for devices in fits:
        partition_spec(names.split(), shape, AbstractMesh((devices,), ("expert",)))


def test_a_dimension_over_several_axes_names_their_product():
    assert "batch = 6 does not divide over mesh axis data*expert = 4" in complaint("batch", (6,), CUBE)


def test_sizes_that_would_work_are_few_enough_to_read():
    assert len(complaint("vocab", (55_440,), AbstractMesh((17,), ("tensor",)))) < 300


def test_other_rules_give_another_layout():
    rules = {**RULES, "time": ("expert",), "batch": ()}
    spec = partition_spec(("batch", "time"), (3, 8), EIGHT, rules)
    assert NamedSharding(EIGHT, spec).shard_shape((3, 8)) == (3, 1)


def test_an_abstract_array_has_shape_dtype_and_place_but_no_data():
    array = abstract_array((8, 6), jnp.bfloat16, ("batch", "hidden"), CUBE)
    assert isinstance(array, jax.ShapeDtypeStruct)
    assert (array.shape, array.dtype) == ((8, 6), jnp.bfloat16)
    assert array.sharding.shard_shape(array.shape) == (2, 3)
    with pytest.raises(BadInput, match=r"embedding\.table \[8, 7\]"):
        abstract_array((8, 7), jnp.float32, ("batch", "hidden"), CUBE, tensor="embedding.table")


@pytest.mark.parametrize(("axis", "nearest"), [("exprt", "expert"), ("Data", "data"), ("tenser", "tensor")])
def test_an_unknown_mesh_axis_names_the_nearest_and_lists_all(axis, nearest):
    with pytest.raises(BadInput) as caught:
        partition_spec(((), (axis,)), (3, 8), CUBE, tensor="router.kernel")
    assert "router.kernel [3, 8] (PartitionSpec(None, " in str(caught.value)
    assert f"no axis {axis!r}; it has data, fsdp, expert, tensor; did you mean {nearest!r}?" in str(caught.value)
    assert str(caught.value).endswith(f"PartitionSpec(None, {nearest!r}) would work")


def test_mesh_axes_as_they_stand_mix_with_names():
    spec = partition_spec(("layer", ("expert", "tensor"), ()), (3, 4, 5), CUBE)
    assert spec == PartitionSpec(None, ("expert", "tensor"), None)
    with pytest.raises(BadInput, match="dimension 1 and hidden both live on mesh axis 'tensor'"):
        partition_spec(("layer", ("expert", "tensor"), "hidden"), (3, 4, 4), CUBE)


def test_uneven_dimensions_pass_only_where_it_is_said():
    assert partition_spec(("group", "token"), (6, 3), EIGHT, uneven=True) == PartitionSpec("expert", None)
    assert "pad it to 8 (inside jit, uneven=True does)" in complaint("group token", (6, 3), EIGHT)


def what_works(message):
    """The spec that a message proposes."""
    return eval(re.search(r"PartitionSpec\(.*?\)(?= would work)", message.rsplit(": ", 1)[-1])[0])


entries = st.one_of(
    st.sampled_from([*RULES, "modle", "xprt"]),
    st.lists(st.sampled_from(["data", "fsdp", "expert", "tensor", "tenser"]), max_size=3).map(tuple),
)


@given(
    st.lists(st.tuples(entries, st.integers(1, 12)), max_size=4),
    st.lists(entries, max_size=1),
    st.sampled_from([EIGHT, CUBE, build_mesh(MeshConfig(data=2, fsdp=2, expert=2))]),
)
def test_what_an_error_proposes_is_accepted_and_what_passes_can_be_made(dimensions, surplus, mesh):
    names, shape = [name for name, _ in dimensions] + surplus, [size for _, size in dimensions]
    try:
        spec, message = partition_spec(names, shape, mesh, tensor="w"), None
    except BadInput as error:
        spec, message = what_works(str(error)), str(error)
    if message:
        assert message.startswith(f"w {shape} (")
        literal = tuple(() if e is None else (e,) if isinstance(e, str) else e for e in spec)
        assert partition_spec(literal, shape, mesh) == spec
    jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=NamedSharding(mesh, spec))


def test_a_variable_lives_where_its_metadata_says():
    value = jnp.zeros((4, 6))
    assert variable_spec(nnx.Param(value, axes=("expert", "hidden")), CUBE, "w") == PartitionSpec("expert", "tensor")
    assert variable_spec(nnx.Param(value, axes=(("data", "tensor"), ())), CUBE, "w")[0] == ("data", "tensor")
    own = (("hidden", ("data",)), ("expert", ()))
    assert variable_spec(nnx.Param(value, axes=("expert", "hidden"), rules=own), CUBE, "w")[1] == "data"
    flax = nnx.Param(value, out_sharding=("expert",), eager_sharding=False)
    assert variable_axes(flax, "w") == (("expert",), ())
    with pytest.raises(
        BadInput, match=r"block\.w \[4, 6\]: no layout was given .* PartitionSpec\(None, None\) would work"
    ):
        variable_spec(nnx.Param(value), CUBE, "block.w")
    with pytest.raises(BadInput, match=r"block\.w \[4, 6\] \(PartitionSpec\(None, 'tensor'\)\)"):
        variable_spec(split(nnx.Param(value), 1, "tensor"), build_mesh(MeshConfig(tensor=4)), "block.w")
