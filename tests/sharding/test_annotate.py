"""Annotations: the layout asked for is the layout that comes out, and a boundary's pair survives the gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding import (
    RULES,
    CompiledStep,
    MeshConfig,
    abstract_array,
    build_mesh,
    manual,
    replicate,
    reshard,
    shard,
    split,
    variable_spec,
)

EIGHT = build_mesh(MeshConfig(expert=8))
CUBE = build_mesh(MeshConfig(data=2, expert=2, tensor=2))

HOME = "experts_here group slot model"
AWAY = "expert expert_group slot model"


def layout(function, shape, mesh=CUBE, start=()):
    """The place of ``function(x)`` for an ``x`` that lies at ``start``; its values must be x's own."""
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with jax.set_mesh(mesh):
        out = jax.jit(function)(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*start))))
    np.testing.assert_array_equal(out, x)
    return out.sharding


def lies(sharding, mesh, *spec):
    return sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), len(spec))


def test_shard_lays_out_by_logical_names():
    sharding = layout(lambda x: shard(x, "batch time heads"), (8, 3, 4))
    assert lies(sharding, CUBE, ("data", "expert"), None, "tensor")


def test_shard_follows_the_rules_it_is_given():
    rules = {**RULES, "time": ("tensor",)}
    assert lies(layout(lambda x: shard(x, "model time", rules), (3, 4)), CUBE, None, "tensor")


def test_replicate_gives_every_device_the_whole():
    sharding = layout(replicate, (8, 4), start=("data", "tensor"))
    assert sharding.is_fully_replicated


@pytest.mark.parametrize(("dimension", "spec"), [(0, ("expert", None)), (1, (None, "expert")), (-1, (None, "expert"))])
def test_split_cuts_one_dimension_and_leaves_the_others_whole(dimension, spec):
    sharding = layout(lambda x: split(x, dimension, "expert"), (8, 4), start=("tensor", "data"))
    assert lies(sharding, CUBE, *spec)


def test_reshard_ends_in_the_second_layout():
    assert lies(layout(lambda x: reshard(x, HOME, AWAY), (8, 8, 2, 3), EIGHT), EIGHT, "expert", None, None, None)
    assert lies(layout(lambda x: reshard(x, AWAY, HOME), (8, 8, 2, 3), EIGHT), EIGHT, None, "expert", None, None)


def test_without_a_mesh_annotations_do_nothing():
    x = jnp.arange(6.0).reshape(2, 3)
    for annotate in (
        replicate,
        lambda x: split(x, 0, "expert"),
        lambda x: shard(x, "batch model"),
        lambda x: reshard(x, "batch model", "model batch"),
    ):
        assert annotate(x) is x
        np.testing.assert_array_equal(jax.jit(annotate)(x), x)
        assert "sharding_constraint" not in str(jax.make_jaxpr(annotate)(x))


def test_split_names_the_axes_that_the_mesh_has():
    with jax.set_mesh(EIGHT), pytest.raises(BadInput, match="no axis 'experts'; it has data, fsdp, expert, tensor"):
        split(jnp.ones((8, 4)), 0, "experts")


def test_split_names_the_dimension_that_does_not_divide():
    with jax.set_mesh(EIGHT), pytest.raises(BadInput, match=r"\[8, 6\] .*: dimension 1 = 6 .* axis expert = 8"):
        split(jnp.ones((8, 6)), 1, "expert")


def test_shard_refuses_what_the_axes_refuse_while_tracing():
    with jax.set_mesh(EIGHT), pytest.raises(BadInput, match="batch = 6 does not divide"):
        jax.jit(lambda x: shard(x, "batch model"))(jnp.ones((6, 4)))


def collectives(to_experts, back):
    """All-to-alls and all-gathers of the loss and gradients of a small MoE layer on 8 devices, top-1, one-hot form."""
    g, s, m, e, c, h = 8, 32, 16, 8, 8, 32

    def loss(tokens, router, up, down):
        gates = jax.nn.softmax(jnp.einsum("gsm,me->gse", tokens, router))
        first = jax.nn.one_hot(gates.argmax(-1), e)
        slot = jax.nn.one_hot((jnp.cumsum(first, 1) * first).sum(-1).astype(int) - 1, c)
        combine = jnp.einsum("gse,gsc->gsec", gates * first, slot)
        dispatched = to_experts(jnp.einsum("gsm,gsec->egcm", tokens, (combine > 0).astype(tokens.dtype)))
        hidden = jax.nn.relu(jnp.einsum("egcm,emh->egch", dispatched, up))
        returned = back(jnp.einsum("egch,ehm->egcm", hidden, down))
        return jnp.sum(jnp.einsum("egcm,gsec->gsm", returned, combine) ** 2)

    step = CompiledStep(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3)),
        (
            abstract_array((g, s, m), jnp.float32, ("group", "token", "model"), EIGHT),
            abstract_array((m, e), jnp.float32, ("embed", "router"), EIGHT),
            abstract_array((e, m, h), jnp.float32, ("expert", "embed", "hidden"), EIGHT),
            abstract_array((e, h, m), jnp.float32, ("expert", "hidden", "embed"), EIGHT),
        ),
        EIGHT,
    )
    return tuple(len(re.findall(rf" {op}(?:-start)?\(", step.hlo)) for op in ("all-to-all", "all-gather"))


def test_a_resharded_boundary_is_all_to_all_in_both_directions_of_the_gradient():
    assert collectives(lambda x: reshard(x, HOME, AWAY), lambda x: reshard(x, AWAY, HOME)) == (4, 0)


def test_one_constraint_a_boundary_gathers_in_the_gradient_which_is_why_reshard_is_a_pair():
    _, gathers = collectives(lambda x: shard(x, AWAY), lambda x: shard(x, HOME))
    assert gathers > 0


ANNOTATIONS = [
    (replicate, ()),
    (lambda x: split(x, 1, "tensor"), (None, "tensor")),
    (lambda x: shard(x, "hidden embed"), ("tensor",)),
    (lambda x: shard(x, PartitionSpec(("expert", "data"))), (("expert", "data"),)),
    (lambda x: shard(x, np.arange(8).reshape(2, 4)), ("data", ("expert", "tensor"))),
    (lambda x: shard(x, np.arange(8).reshape(4, 2).T), ("tensor", ("data", "expert"))),
]


@pytest.mark.parametrize(("annotate", "spec"), ANNOTATIONS)
def test_what_can_be_annotated_comes_back_with_its_layout(annotate, spec):
    x, wanted = jnp.arange(32.0).reshape(8, 4), NamedSharding(CUBE, PartitionSpec(*spec))
    with jax.set_mesh(CUBE):
        for out in (annotate(x), annotate(np.asarray(x)), jax.jit(annotate)(x), annotate(nnx.Param(x)).get_value()):
            assert out.sharding.is_equivalent_to(wanted, 2)
            np.testing.assert_array_equal(out, x)
        abstract = annotate(jax.ShapeDtypeStruct((8, 4), jnp.bfloat16))
    assert (abstract.shape, abstract.dtype, abstract.sharding.mesh) == ((8, 4), jnp.bfloat16, CUBE)
    assert abstract.sharding.is_equivalent_to(wanted, 2)


@pytest.mark.parametrize(("annotate", "spec"), ANNOTATIONS)
def test_a_parameter_remembers_its_layout_wherever_it_is_made(annotate, spec):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.w = annotate(nnx.Param(jax.random.normal(rngs.params(), (8, 4)), note="kept"))

    def model():
        return Model(nnx.Rngs(0))

    with jax.set_mesh(CUBE):
        made = [model(), nnx.jit(model)(), nnx.eval_shape(model)]
    for module in made:
        got = NamedSharding(CUBE, variable_spec(module.w, CUBE, "w"))
        assert got.is_equivalent_to(NamedSharding(CUBE, PartitionSpec(*spec)), 2)
        assert type(module.w) is nnx.Param
        assert module.w.get_metadata("note") == "kept"
    np.testing.assert_allclose(made[0].w.get_value(), made[1].w.get_value(), rtol=1e-6)
    assert isinstance(made[2].w.get_value(), jax.ShapeDtypeStruct)


def test_a_parameter_remembers_without_a_mesh_and_rules_of_its_own():
    x = jnp.ones((8, 4))
    named = shard(nnx.Param(x), "hidden model", {**RULES, "hidden": ("data", "tensor")})
    assert named.get_value() is x
    assert variable_spec(named, CUBE, "w") == PartitionSpec(("data", "tensor"), None)
    assert variable_spec(split(nnx.Param(x), -1, "expert"), CUBE, "w") == PartitionSpec(None, "expert")


def test_parameters_of_vmapped_modules_are_laid_out_too():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return split(nnx.Param(jax.random.normal(rngs.params(), (8, 4))), 0, "expert")

    with jax.set_mesh(CUBE):
        stacked = make(nnx.Rngs(0))
    assert stacked.get_metadata("axes") == (("expert",), ())
    assert lies(stacked.get_value().sharding, CUBE, None, "expert", None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("expert", "1 axis names for 2 dimensions"),
        ("expert modle", "no rule for axis 'modle'; did you mean 'model'"),
        (PartitionSpec("data", None, None), "3 axis names for 2 dimensions"),
        (PartitionSpec(PartitionSpec.UNCONSTRAINED), r"UNCONSTRAINED.*PartitionSpec\(None, None\) would work"),
        (np.arange(8).reshape(4, 2), "no spec of them says the same"),
    ],
)
def test_a_parameter_is_refused_where_it_is_made(spec, message):
    with pytest.raises(BadInput, match=message) as caught:
        shard(nnx.Param(jnp.ones((8, 4))), spec, name="w_in")
    assert "w_in [8, 4]" in str(caught.value)


@pytest.mark.parametrize("dimension", [2, -3])
def test_a_dimension_that_is_not_there_is_counted(dimension):
    x = jnp.ones((3, 4))
    with pytest.raises(BadInput, match=f"no dimension {dimension}; it has 2, counted from 0"):
        split(x, dimension, "expert")
    with jax.set_mesh(CUBE), pytest.raises(BadInput, match=r"w \[3, 4\].*PartitionSpec\(None, 'expert'\) would work"):
        split(x, dimension, "expert", name="w")


def test_some_dimensions_may_be_left_to_the_partitioner_inside_jit_only():
    free = PartitionSpec(PartitionSpec.UNCONSTRAINED, "tensor")
    assert lies(layout(lambda x: shard(x, free), (8, 4), start=("data",)), CUBE, "data", "tensor")
    with jax.set_mesh(CUBE), pytest.raises(BadInput, match=r"PartitionSpec\(None, 'tensor'\) would work"):
        shard(jnp.ones((8, 4)), free)


UNEVEN = [
    lambda x: split(x, 0, "expert", uneven=True),
    lambda x: shard(x, "batch model", uneven=True),
    lambda x: shard(x, np.arange(8).reshape(8, 1), uneven=True),
]


@pytest.mark.parametrize("annotate", UNEVEN)
def test_uneven_dimensions_are_padded_and_masked_by_the_partitioner(annotate):
    x = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)

    def loss(x, annotate=annotate):
        y = annotate(x * 2.0)
        assert y.shape == (11, 3)
        return (jnp.exp(y).sum(0) * jnp.max(y, 0)).sum()

    with jax.set_mesh(CUBE):
        step = jax.jit(jax.value_and_grad(loss))
        value, gradient = step(x)
        assert re.search(r"f32\[(6|3|2),3\]", step.lower(x).compile().as_text())  # a piece, the last one padded
    wanted, wanted_gradient = jax.value_and_grad(lambda x: loss(x, lambda y: y))(x)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5)


@pytest.mark.parametrize("annotate", UNEVEN)
def test_what_crosses_the_boundary_of_jit_must_divide_all_the_same(annotate):
    x = jnp.ones((11, 3))
    with jax.set_mesh(CUBE):
        for outside in (x, nnx.Param(x), jax.ShapeDtypeStruct(x.shape, x.dtype)):
            with pytest.raises(BadInput, match=r"\[11, 3\].* does not divide .*pad it to (12|16) "):
                annotate(outside)


def test_manual_on_some_axes_leaves_the_others_to_the_partitioner():
    def matmul(x, w):
        local = shard(x @ w, "token hidden")
        return jax.lax.psum(local, "expert")

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    rules = {**RULES, "cut": ("expert",)}
    with jax.set_mesh(CUBE):
        by_hand = manual(matmul, ["token cut", "cut hidden"], "token", rules, axes=["expert"])
        step = jax.jit(by_hand)
        out = step(x, w)
        hlo = step.lower(x, w).compile().as_text()
        automatic = jax.jit(lambda x, w: shard(x @ w, "token hidden"))(x, w)
    assert out.sharding.shard_shape(out.shape) == (4, 3)  # split over tensor, which stayed automatic
    assert re.search(r"f32\[4,3\]\S* (dot|all-reduce|fusion)\(", hlo)
    np.testing.assert_allclose(out, automatic, rtol=1e-5)
    np.testing.assert_allclose(out, x @ w, rtol=1e-5)


def test_the_gradient_of_a_partly_manual_function_is_the_automatic_ones():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    rules = {**RULES, "cut": ("expert",)}

    def by_hand(x, w):
        total = manual(
            lambda x, w: jax.lax.psum(x @ w, "expert"), ["token cut", "cut"], "token", rules, axes=["expert"]
        )
        return (total(x, shard(w, "model hidden")) ** 2).sum()

    with jax.set_mesh(CUBE):
        got = jax.jit(jax.grad(by_hand, argnums=(0, 1)))(x, w)
    for ours, theirs in zip(got, jax.grad(lambda x, w: ((x @ w) ** 2).sum(), argnums=(0, 1))(x, w), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_inside_manual_names_mean_the_share_and_its_axes_are_taken():
    seen = []

    def inside(x):
        seen.append(x.shape)
        return shard(x, "batch model")  # data only: expert is manual

    with jax.set_mesh(CUBE):
        out = jax.jit(manual(inside, ["expert"], "expert", axes=["expert"]))(jnp.ones((8, 4)))
        np.testing.assert_array_equal(out, jnp.ones((8, 4)))
        with pytest.raises(BadInput, match="'expert' is manual here"):
            jax.jit(manual(lambda x: split(x, 0, "expert"), ["expert"], "expert", axes=["expert"]))(jnp.ones((8, 4)))
    assert seen == [(4, 4)]


@pytest.mark.parametrize(
    ("names", "axes", "message"),
    [
        ("expert", ["exprt"], "no axis 'exprt'; it has data, fsdp, expert, tensor; did you mean 'expert'"),
        ("exprt", None, "no rule for axis 'exprt'; did you mean 'expert'"),
        ("expert batch", None, "expert and batch both live on mesh axis 'expert'"),
    ],
)
def test_manual_names_what_it_does_not_know(names, axes, message):
    with jax.set_mesh(CUBE), pytest.raises(BadInput, match=message):
        manual(lambda x: x, [names], "model", axes=axes)


def test_manual_names_the_argument_that_does_not_divide():
    halves = manual_in(CUBE, lambda pair, x: x, ["", "batch model"], "batch")
    assert halves({}, jnp.ones((8, 3))).shape == (8, 3)
    where, why = r"argument 2 of manual \[6, 3\] \(batch model\)", r"batch = 6 does not divide over .* data\*expert = 4"
    with pytest.raises(BadInput, match=f"{where}: {why}; pad it to 8"):
        halves({}, jnp.ones((6, 3)))
    of_pair = manual_in(CUBE, lambda pair: pair, ["batch"], "batch")
    with pytest.raises(BadInput, match=r"argument 1 of manual \[2\]"):
        of_pair({"a": jnp.ones(4), "b": jnp.ones(2)})


def manual_in(mesh, *args):
    def call(*arguments):
        with jax.set_mesh(mesh):
            return jax.jit(lambda *inside: manual(*args)(*inside))(*arguments)

    return call


def test_a_boundary_names_its_array():
    with jax.set_mesh(EIGHT), pytest.raises(BadInput, match=r"slots \[8, 6, 2, 3\]"):
        jax.jit(lambda x: reshard(x, HOME, AWAY, name="slots"))(jnp.ones((8, 6, 2, 3)))
