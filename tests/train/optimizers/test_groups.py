"""What a parameter is, for every parameter of a model with everything in it."""

import math

import jax
import pytest

from gshardx.config import Config, ModelConfig, MoEConfig
from gshardx.train.job import Job
from gshardx.train.optimizers.groups import Matrix, decays, is_hidden_matrix, is_router, matrix_of
from tests.train.optimizers.stacks import PARAMETERS


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_what_it_was_written_down_to_be(name):
    parameter = PARAMETERS[name]
    names = tuple(parameter.names.split())
    matrix = matrix_of(names)
    assert (matrix is not None) == (len(parameter.unit) == 2)
    assert (decays(names), is_hidden_matrix(names)) == (parameter.decays, parameter.hidden)
    if matrix is not None:
        sides = [math.prod(parameter.shape[at] for at in side) for side in matrix]
        assert tuple(sides) == parameter.unit


def test_heads_and_their_width_are_one_side():
    assert matrix_of(("layer", "embed", "kv_heads", "head_dim")) == Matrix((1,), (2, 3))
    assert matrix_of(("layer", "heads", "head_dim", "embed")) == Matrix((1, 2), (3,))


def test_what_is_no_matrix_is_none():
    """Three sides, or dimensions that only have mesh axes (a module that Flax annotated)."""
    assert matrix_of(("vocab", "embed", "hidden")) is None
    assert matrix_of(((), ("fsdp",))) == Matrix((0,), (1,))
    assert decays(("vocab", "embed", "hidden"))


def test_every_parameter_of_a_model_with_everything_has_its_group():
    moe = MoEConfig(num_experts=4, hidden=8, biases=True, shared_hidden=8, shared="residual")
    model = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, moe=moe)
    axes = Job.of(Config(model=model), 257).blueprint.axes
    found = {"hidden": set(), "router": set(), "table": set(), "vector": set()}
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        written = jax.tree_util.keystr(path, simple=True, separator=".").removeprefix("stack.units.")
        kind = "router" if is_router(names) else "hidden" if is_hidden_matrix(names) else None
        found[kind or ("table" if matrix_of(names) else "vector")].add(written)
    assert found["table"] == {"embedding.table", "unembedding.kernel"}
    assert found["router"] >= {"sparse.feed_forward.router.kernel", "sparse.feed_forward.beside.kernel"}
    assert all(".w_" in name for name in found["hidden"])
    assert all("norm" in name or ".b_" in name for name in found["vector"]), found["vector"]
    assert len(found["hidden"]) == 2 * 4 + 3 + 3 + 3  # attention, dense, experts, shared
