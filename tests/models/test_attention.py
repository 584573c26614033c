"""Options of attention and rotary positions that a config names."""

import math

import jax
import pytest
from flax import nnx

from gshardx.config import ModelConfig, check_model_on_mesh
from gshardx.errors import BadInput
from gshardx.layers import Rope
from gshardx.models.attention import build_attention, check_attention, matrices, vectors
from gshardx.sharding import MeshConfig

LATENT = {"kind": "latent", "kv_rank": 8, "rope_dim": 4, "nope_dim": 6, "value_dim": 5}


def test_what_is_named_is_what_is_built():
    config = ModelConfig(
        rope_base=5.0, rope={"scaling": "linear", "factor": 2, "width": None}, attention={"biases": "qkv"}
    )
    assert check_attention(config) == (Rope(base=5.0, scaling="linear", factor=2), {"biases": "qkv"})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope": {"scale": 2.0}}, r"model\.rope\.scale: rope has no such option; did you mean 'scaling'"),
        ({"rope": {"base": 2.0}}, r"model\.rope\.base: rope has no such option"),
        ({"rope": {"scaling": "ntk"}}, r"model\.rope\.scaling = ntk: use one of none, linear"),
        ({"rope": {"interleaved": 1}}, r"model\.rope\.interleaved = 1: expected bool"),
        ({"rope": {"width": 64}}, r"model\.rope\.width = 64 is more than the head's 32; use 32 or less"),
        ({"rope": {"factors": [1.0, "a"]}}, r"model\.rope\.factors\[1\] = a: expected float"),
        ({"attention": {"bias": "qkv"}}, r"model\.attention\.bias: attention has no such option; did you mean 'bia"),
        ({"attention": {"qkv_clip": -1.0}}, r"model\.attention\.qkv_clip = -1.0: must be 0 or more"),
        ({"attention": {"window": 0}}, r"model\.attention\.window = 0: must be 1 or more"),
        ({"attention": {"full_every": 2}}, r"model\.attention\.full_every = 2 without window or chunk"),
        ({"attention": {"temperature_floor": 0}}, r"model\.attention\.temperature_floor = 0: must be 1 or more"),
        ({"attention": {"scale": 1.0}}, r"model\.attention\.scale: attention has no such option"),
        ({"attention": {"kind": "local"}}, r"model\.attention\.kind = local: use one of grouped, latent"),
        ({"attention": {"kv_rank": 8}}, r"model\.attention\.kv_rank: attention has no such option"),
        ({"attention": LATENT | {"qk_norm": "head"}}, r"qk_norm: attention of kind latent has no such option"),
        ({"attention": {"kind": "latent", "kv_rank": 8}}, r"model\.attention\.rope_dim: .* of kind latent needs it"),
        ({"attention": LATENT | {"rope_dim": 3}}, r"model\.attention\.rope_dim = 3: .* use 4"),
        ({"attention": LATENT, "rope": {"width": 6}}, r"model\.rope\.width = 6 is more than the head's 4"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_said(keys, said):
    with pytest.raises(BadInput, match=said):
        check_attention(ModelConfig(**keys))


def test_heads_need_not_suit_what_latent_attention_does_not_have():
    config = ModelConfig(width=12, heads=3, head_dim=5, attention=LATENT | {"q_rank": 10})
    check_model_on_mesh(config, MeshConfig(fsdp=2))
    with pytest.raises(BadInput, match=r"model\.heads = 3 does not divide over mesh\.tensor = 2"):
        check_model_on_mesh(config, MeshConfig(tensor=2))
    with pytest.raises(BadInput, match=r"model\.attention\.q_rank = 10 does not divide over mesh\.fsdp = 4"):
        check_model_on_mesh(config, MeshConfig(fsdp=4))


@pytest.mark.parametrize(
    "attention",
    [
        {}, {"biases": "qkv", "qk_norm": "head"}, {"biases": "qkvo", "qk_norm": "whole", "sinks": True},
        LATENT, LATENT | {"q_rank": 10, "biases": True},
    ],
)  # fmt: skip
def test_matrices_and_vectors_are_those_that_are_built(attention):
    config = ModelConfig(width=12, heads=4, kv_heads=2, head_dim=6, attention=attention)
    made = jax.eval_shape(lambda: nnx.state(build_attention(config, 1.0, nnx.Rngs(0)), nnx.Param))
    sizes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(made)}
    built = sorted(math.prod(shape) for name, shape in sizes.items() if "'w_" in name)
    assert sorted(one.inputs * one.outputs for one in matrices(config)) == built
    assert sum(vectors(config)) == sum(map(math.prod, sizes.values())) - sum(built)
