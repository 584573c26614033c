"""Annotations: the layout asked for is the layout that comes out, and a boundary's pair survives the gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding import (
    RULES,
    CompiledStep,
    MeshConfig,
    abstract_array,
    build_mesh,
    replicate,
    reshard,
    shard,
    split,
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
    with jax.set_mesh(EIGHT), pytest.raises(BadInput, match=r"\[8, 6\]: dimension 1 = 6 .* axis expert = 8"):
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
