"""Parameters say where they live, in every way of saying it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from gshardx.errors import BadInput
from gshardx.layers import param_shardings
from gshardx.layers.param import fan_in_normal, param
from gshardx.sharding import MeshConfig, build_mesh, replicate, shard, split

CUBE = build_mesh(MeshConfig(data=2, expert=2, tensor=2))


class Annotated(nnx.Module):
    def __init__(self):
        self.named = param(jax.random.key(0), "expert hidden", (4, 6), fan_in_normal(4))
        self.cut = split(nnx.Param(jnp.ones((4, 6))), 1, "tensor")
        self.spec = shard(nnx.Param(jnp.ones((4, 6))), PartitionSpec(("data", "expert")))
        self.whole = replicate(nnx.Param(jnp.ones(3)))


def test_shardings_follow_names_specs_and_splits_alike():
    module = Annotated()
    placed = nnx.to_pure_dict(param_shardings(nnx.state(module, nnx.Param), CUBE))
    assert {name: sharding.spec for name, sharding in placed.items()} == {
        "named": PartitionSpec("expert", "tensor"),
        "cut": PartitionSpec(None, "tensor"),
        "spec": PartitionSpec(("data", "expert"), None),
        "whole": PartitionSpec(None),
    }


def test_a_parameter_without_a_layout_is_named():
    module = Annotated()
    module.plain = nnx.Param(jnp.ones((2, 3)))
    with pytest.raises(BadInput, match=r"^plain \[2, 3\]: no layout was given where it is made"):
        param_shardings(nnx.state(module, nnx.Param), CUBE)


def test_names_are_counted_where_the_parameter_is_made():
    with pytest.raises(BadInput, match=r"parameter \[4, 6\] \(expert\): 1 axis names for 2 dimensions"):
        param(jax.random.key(0), "expert", (4, 6), fan_in_normal(4))
