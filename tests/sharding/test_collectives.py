"""What a program sends: operation, mesh axes, count and bytes, in every notation; and budgets."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding import Allowance, Budget, Collective, MeshConfig, build_mesh, collectives, totals

RECORDED = Path(__file__).parent / "hlo"
MESH = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
FSDP_EXPERT = build_mesh(MeshConfig(fsdp=2, expert=4))


def of(groups, mesh=MESH, op="all-reduce"):
    """The axes that a program of one ``op`` over ``groups`` crosses; ``()``: it sends nothing."""
    every = collectives(
        f"ENTRY %main (a: f32[10]) -> f32[10] {{\n  %a = f32[10]{{0}} parameter(0)\n"
        f"  ROOT %it = f32[10]{{0}} {op}(%a), channel_id=1, {groups}, use_global_device_ids=true\n}}",
        mesh,
    )
    for found in every:
        assert (found.op, found.count, found.bytes_per_device) == (op, 1, 40)
    return every[0].axes if every else ()


def differing(rows, mesh):
    """The twin: axes along which any two devices of a group have different places."""
    places = dict(enumerate(np.ndindex(*mesh.devices.shape)))
    return tuple(
        axis
        for at, axis in enumerate(mesh.axis_names)
        if any(places[a][at] != places[b][at] for row in rows for a, b in itertools.combinations(row, 2))
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("expert",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,3,5,6},{1,2,4,7}}", ("data", "expert", "tensor")),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
        ("replica_groups={}", ("data", "expert", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("expert",)),
        ("replica_groups=[1,8]<=[8]", ("data", "expert", "tensor")),
        ("replica_groups=mesh['data'=2,'fsdp'=1,'expert'=2,'tensor'=2] {'expert'}", ("expert",)),
        ("replica_groups=mesh['data'=2,'fsdp'=1,'expert'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor")),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "expert", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("expert", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",)),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", ("data",)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", ("expert",)),
        ("replica_groups=mesh['x'=8] {'x':(4)2}", ("tensor",)),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", ("expert", "tensor")),
        ("replica_groups=mesh['x'=4,'y'=2] {'x':(2)2,'y'}", ("expert", "tensor")),
    ],
)
def test_every_notation_of_replica_groups(groups, axes):
    assert of(groups) == axes


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        ("{{0,1},{1,0}}", ("tensor",)),
        ("{{0,2},{2,0},{5,7}}", ("expert",)),
        ("{{0,7}}", ("data", "expert", "tensor")),
        ("{{3,3}}", ()),
    ],
)
def test_permutes_name_pairs(pairs, axes):
    assert of(f"source_target_pairs={pairs}", op="collective-permute") == axes


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2)]).flatmap(
        lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
    ),
    st.sampled_from([1, 2, 4, 8]),
)
def test_any_transposed_iota_is_numpys(shape_and_order, width):
    shape, order = shape_and_order
    rows = np.arange(8).reshape(shape).transpose(order).reshape(-1, width)
    text = f"replica_groups=[{8 // width},{width}]<=[{','.join(map(str, shape))}]"
    text += f"T({','.join(map(str, order))})" if list(order) != sorted(order) else ""
    assert of(text) == differing(rows, MESH)


@settings(max_examples=200, deadline=None)
@given(st.permutations(range(8)), st.sampled_from([1, 2, 4, 8]), st.sampled_from([MESH, FSDP_EXPERT]))
def test_any_listed_groups_are_the_twins(ids, width, mesh):
    rows = np.array(ids).reshape(-1, width)
    text = ",".join("{" + ",".join(map(str, row)) + "}" for row in rows)
    assert of(f"replica_groups={{{text}}}", mesh) == differing(rows, mesh)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(8,), (2, 4), (4, 2), (2, 2, 2)]).flatmap(
        lambda shape: st.tuples(st.just(shape), st.sets(st.sampled_from(range(len(shape))), min_size=1))
    ),
    st.sampled_from(["", "[2,4]T(1,0)", "[2,2,2]T(2,1,0)"]),
)
def test_any_axes_of_a_mesh_are_numpys(shape_and_chosen, order):
    shape, chosen = shape_and_chosen
    ids = np.arange(8)
    if order:
        sizes, axes = (list(map(int, part.split(","))) for part in re.findall(r"[\d,]+", order))
        ids = ids.reshape(sizes).transpose(axes)
    chosen = sorted(chosen)
    rows = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0)).reshape(
        -1, int(np.prod([shape[at] for at in chosen]))
    )
    sizes = ",".join(f"'a{at}'={size}" for at, size in enumerate(shape))
    over = ",".join(f"'a{at}'" for at in chosen)
    text = f"replica_groups=mesh[{sizes}]{f', device_ids=({order})' if order else ''} {{{over}}}"
    assert of(text) == differing(rows, MESH)


@pytest.mark.parametrize("name", ["cpu_jax_0.10", "cpu_jax_0.12", "tpu_v5p_jax_0.10", "tpu_v5p_jax_0.12"])
def test_recorded_programs_say_the_same_but_for_tpus_narrower_numbers(name):
    """Slots [8 e, 32 g, 128 m] of a device there and back, and half of [2, 128, 128] of weights gathered, 3 times."""
    found = totals(collectives((RECORDED / f"{name}.txt").read_text(), FSDP_EXPERT))
    slots, weights = 3 * 8 * 8 * 128, 3 * 2 * 64 * 128
    there, kernel = (2, 2) if "tpu" in name else (4, 4)  # bf16 is what a TPU multiplies
    assert sorted((one.op, one.axes, one.count, one.bytes_per_device) for one in found) == [
        ("all-gather", ("fsdp",), 3, weights * kernel),
        ("all-reduce", ("fsdp", "expert"), 1, 4),
        ("all-to-all", ("expert",), 6, slots * (there + 4)),
    ]


def test_gpu_notation_counts_pairs_once():
    mesh = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
    found = collectives((RECORDED / "gpu.txt").read_text(), mesh)
    assert sorted((one.op, one.axes, one.count, one.bytes_per_device) for one in found) == [
        ("all-gather", ("tensor",), 1, 32 * 16 * 2),
        ("all-reduce", ("data", "expert", "tensor"), 10, 10 * 32),
        ("all-to-all", ("expert", "tensor"), 1, 64 * 32 * 4),
        ("collective-permute", ("data",), 1, 32),
        ("ragged-all-to-all", ("expert", "tensor"), 1, 32),
        ("reduce-scatter", ("expert", "tensor"), 1, 64 * 32 * 4),
    ]
    by_op = {one.op: one for one in found}
    assert by_op["all-reduce"].source == "project/layers/norm.py:21"
    assert by_op["all-reduce"].op_name == "jit(step)/while/psum"


BODIES = {
    "psum": (lambda x: jax.lax.psum(x, ("data", "tensor")), ("all-reduce", ("data", "tensor"))),
    "all_gather": (lambda x: jax.lax.all_gather(x, "expert").sum(0), ("all-gather", ("expert",))),
    "all_to_all": (
        lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True),
        ("all-to-all", ("expert",)),
    ),
    "ppermute": (lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), ("collective-permute", ("tensor",))),
    "psum_scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (2, 1)),
        ("reduce-scatter", ("data",)),
    ),
}


def over_all_devices(function):
    """The compiled program in which each device has its own [4, 6] floats."""
    spec = PartitionSpec(("data", "expert", "tensor"))
    mapped = jax.shard_map(function, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((32, 6), jnp.float32, sharding=NamedSharding(MESH, spec))
    return jax.jit(mapped).lower(x).compile()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("turns", [1, 3])
def test_known_programs(name, turns):
    body, (op, axes) = BODIES[name]

    def looped(x):
        return jax.lax.scan(lambda y, _: (jnp.sin(body(y)), None), x, length=turns)[0]

    (found,) = totals(collectives(over_all_devices(body if turns == 1 else looped), MESH))
    assert (found.op, found.axes) == (op, axes)
    assert (found.count, found.bytes_per_device) == (turns, turns * 4 * 6 * 4)
    assert Path(__file__).name in found.source


def test_nested_scans_multiply():
    def inner(y, _):
        return jnp.sin(jax.lax.psum(y, "data")), None

    def outer(y, _):
        return jax.lax.scan(inner, jnp.cos(y), length=3)[0], None

    (found,) = totals(collectives(over_all_devices(lambda x: jax.lax.scan(outer, x, length=5)[0]), MESH))
    assert (found.op, found.count, found.bytes_per_device) == ("all-reduce", 15, 15 * 96)


def test_a_program_that_sends_nothing():
    assert collectives(over_all_devices(jnp.sin), MESH) == []


# Budgets.

SENT = partial(Collective, "all-to-all", ("expert",))
EXACT = Allowance("all-to-all", ("expert",), count=4, bytes_per_device=400, least=4, least_bytes=400)


def test_a_step_that_keeps_to_its_budget_breaches_nothing():
    assert Budget((EXACT,)).breaches([SENT(1, 100), SENT(3, 300)]) == []  # added up


@pytest.mark.parametrize(
    ("found", "breach"),
    [
        ([SENT(5, 400)], "allows 4"),
        ([SENT(4, 401)], "allows 400 bytes"),
        ([SENT(3, 400)], "expects 4 or more"),
        ([SENT(4, 399)], "expects 400 bytes or more"),
        ([SENT(4, 400), Collective("all-to-all", ("data",), 1, 1)], "allows none"),
        ([SENT(4, 400), Collective("all-gather", ("expert",), 1, 1)], "allows none"),
        ([SENT(4, 400), Collective("all-reduce", ("data",), 1, 11)], "allows 10 bytes of such reductions"),
    ],
)
def test_every_breach_is_one_line_that_says_what_and_where(found, breach):
    (line,) = Budget((EXACT,), small=10).breaches([*found[:-1], _with_source(found[-1])])
    assert breach in line
    assert "moe.py:3 jit(f)/gate" in line


def _with_source(one):
    return Collective(one.op, one.axes, one.count, one.bytes_per_device, "layers/moe.py:3", "jit(f)/gate")


def test_an_exchange_that_vanished_is_a_breach_too():
    assert [line for line in Budget((EXACT,)).breaches([]) if "0 all-to-all over expert" in line]


def test_small_reductions_share_one_allowance():
    reductions = [Collective("all-reduce", (axis,), 1, 6) for axis in ("data", "fsdp")]
    assert Budget(small=12).breaches(reductions) == []
    assert len(Budget(small=11).breaches(reductions)) == 2
    only = Allowance("all-reduce", ("data",))
    assert Budget((only,), small=6).breaches(reductions) == []  # named ones are not small ones


def test_what_is_reduced_across_an_axis_is_added_up_over_every_kind():
    found = [Collective("all-reduce", ("data",), 1, 4), Collective("reduce-scatter", ("data", "expert"), 1, 6)]
    kinds = tuple(Allowance(one.op, one.axes) for one in found)
    assert Budget(kinds, reduced={"data": 10, "expert": 6, "fsdp": 0}).breaches(found) == []
    (line,) = Budget(kinds, reduced={"data": 9, "expert": 6}).breaches([_with_source(found[0]), found[1]])
    assert "the budget allows 9 bytes of all that is reduced across data" in line
    assert "1 reduce-scatter over data*expert, 6 bytes a device and 1 all-reduce over data, 4 bytes" in line
    assert "(layers/moe.py:3 jit(f)/gate)" in line
    gathered = Collective("all-gather", ("data",), 1, 100)
    assert Budget((*kinds, Allowance("all-gather", ("data",))), reduced={"data": 10}).breaches([*found, gathered]) == []


def test_an_allowance_without_numbers_allows_any_amount():
    assert Budget((Allowance("all-to-all", ("expert",)),)).breaches([SENT(10**6, 10**12)]) == []


def test_an_unknown_operation_is_refused():
    with pytest.raises(BadInput, match=r"'all-too-all'.*all-to-all, "):
        Allowance("all-too-all", ("expert",))


def test_what_tpus_fuse_is_counted_and_an_asynchronous_one_only_where_it_starts():
    mesh = build_mesh(MeshConfig(fsdp=4, expert=2))
    found = collectives((RECORDED / "tpu_v5e_fused.txt").read_text(), mesh)
    assert [(one.op, one.axes, one.count, one.bytes_per_device) for one in found] == [
        ("all-gather", ("fsdp",), 1, 2048 * 128 * 4),
        ("reduce-scatter", ("fsdp",), 1, 512 * 2048 * 4),
    ]
    assert found[1].op_name == "jit(train)/transpose(jvp(btm,btv->mv))/dot_general", "the fusion's own name"


def test_a_notation_of_groups_that_is_not_known_is_no_silent_guess():
    with pytest.raises(ValueError, match="not known here: replica_groups=newstyle<4>"):
        of("replica_groups=newstyle<4>")


def test_a_kind_is_allowed_once():
    twice = Allowance("all-gather", ("data",)), Allowance("all-gather", ("data",), count=3)
    with pytest.raises(BadInput, match=r"all-gather over data is allowed twice"):
        Budget(twice)
