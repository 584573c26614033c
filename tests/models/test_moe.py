"""From config to layer: every option reaches its router, and a wrong one is answered in a line."""

from typing import get_args, get_type_hints

import jax
import pytest
from flax import nnx

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import Auto, Capacity, Einsum, Gather, Ragged, Residual, Shared
from gshardx.layers.balance import BalanceLoss
from gshardx.layers.losses import CommunicationLoss, DeviceLoss
from gshardx.layers.routing import ROUTERS
from gshardx.layers.routing.linear import LinearRouter
from gshardx.layers.routing.soft_moe import Fixed
from gshardx.models.moe import (
    build_moe,
    check_router_options,
    dispatcher_reason,
    router_matrices,
    router_options,
    training_slots,
)

NEEDED = {
    "stable": {"losses": {"distillation": 0.3}},
    "relu": {"losses": {"sparsity": 1.0}},
    "task": {"router_options": {"tags": [1, 2]}},
    "demix": {"router_options": {"tags": list(range(8))}},
}
"""What a router is not built without."""
MERGING = ("smear", "lory", "meo")


def built(**moe):
    moe = {"num_experts": 8, "hidden": 8, **NEEDED.get(moe.get("router"), {}), **moe}
    config = ModelConfig(width=16, moe=MoEConfig(**moe))
    return nnx.eval_shape(lambda: build_moe(config, 1.0, nnx.Rngs(0), vocab=100))


def complaint(**moe):
    with pytest.raises(BadInput) as caught:
        check_router_options(MoEConfig(**{"num_experts": 8, **moe}))
    return str(caught.value)


def test_the_config_lists_the_registry():
    assert get_args(get_type_hints(MoEConfig)["router"]) == tuple(ROUTERS)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_built_by_its_name_with_its_capacity(name):
    layer = built(router=name, top_k=1, capacity_factor=2.0)
    assert type(layer.router) is ROUTERS[name]
    own = {
        "expert_choice": Capacity(0.25, evaluation=0.25),  # of its 8 choices a token as many slots as of one
        "soft_moe": Fixed(minimum=1),  # parameters
        "moe_pp": Capacity(2.0 * 0.6),  # what tau of 8 are of tau 8 + 4
        **dict.fromkeys(MERGING, Capacity(None)),
    }
    assert layer.router.capacity == own.get(name, Capacity(2.0))


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("expert_choice", "soft_moe")])
def test_every_router_is_dropless_without_a_factor(name):
    assert built(router=name, top_k=1, capacity_factor=None).router.capacity == Capacity(None)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("top_k", [(16, 8)]),
        ("noisy_top_k", [(16, 8), (16, 8)]),
        ("dselect_k", [(16, 12)]),
        ("moe_pp", [(16, 8), (16, 4), (16, 4), (2, 16)]),  # the last two of constant experts
    ],
)
def test_matrices_of_a_router_are_those_of_tokens(name, sides):
    assert router_matrices(ModelConfig(width=16, moe=MoEConfig(num_experts=8, router=name, top_k=3))) == sides


@pytest.mark.parametrize(("name", "slots"), [("top_k", 24), ("expert_choice", 24), ("ds_moe", 64), ("soft_moe", 1)])
def test_slots_are_those_of_the_router(name, slots):
    """1.5 * 64 / 8 of each choice; all experts' in training for ds_moe, where no more than all tokens fit."""
    assert training_slots(MoEConfig(num_experts=8, router=name, capacity_factor=1.5), 64) == slots


def test_options_reach_the_router():
    options = {"groups": 4, "groups_kept": 2, "rate": 0.01, "priority": "gate", "bias": True}
    router = built(router="sigmoid_bias", router_options=options).router
    assert (router.groups, router.groups_kept, router.rate, router.priority) == (4, 2, 0.01, "gate")
    assert router.bias.shape == (8,)


def test_losses_are_the_routers_own_and_those_that_are_weighed():
    names = dict(built(losses={"balance": 0.01}).router.losses)
    assert set(names) == {"balance", "z"}
    assert names["balance"] == BalanceLoss(choices="first")
    losses = {"device": 0.05, "communication": 0.02, "batch": 0.1}
    names = dict(built(router="top_k", router_options={"groups": 4, "groups_kept": 2}, losses=losses).router.losses)
    assert names["device"] == DeviceLoss(4)
    assert names["communication"] == CommunicationLoss(4, 2)
    assert names["batch"] == BalanceLoss(over="batch")


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"router_options": {"thresold": 1.0}}, ["thresold", "did you mean 'threshold'"]),
        ({"router_options": {"second_expert": "never"}}, ["second_expert = never", "all, sampling, random"]),
        ({"router_options": {"threshold": "high"}}, ["threshold = high", "float"]),
        ({"router_options": {"threshold": True}}, ["threshold = True", "float"]),
        ({"router_options": {"rngs": 3}}, ["rngs", "did you mean"]),
        ({"router": "switch"}, ["top_k = 2", "use top_k 1"]),
        ({"router": "smear"}, ["merges all experts", "top_k = 2", "use top_k 1"]),
        ({"router": "meo", "dispatcher": "gather"}, ["dispatcher = gather", "merges experts", "use auto"]),
        ({"router": "meo", "wire": "bfloat16"}, ["wire = bfloat16", "sends no token", "use same"]),
        ({"router": "top_k", "router_options": {"groups": 3}}, ["groups = 3", "num_experts = 8"]),
        ({"router": "top_k", "router_options": {"groups": 8}}, ["groups_kept = 1", "use 2"]),
        ({"router_options": {"threshold": -1.0}}, ["threshold = -1.0", "0 or more"]),
        ({"losses": {"device": 0.1}}, ["losses.device", "top_k or sigmoid_bias"]),
        ({"router": "top_k", "losses": {"device": 0.1}}, ["losses.device", "router_options.groups"]),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_what_would_do(moe, said):
    message = complaint(**moe)
    for part in said:
        assert part in message


def test_an_integer_will_do_for_a_float():
    assert check_router_options(MoEConfig(router_options={"threshold": 1})) == {"threshold": 1}


@pytest.mark.parametrize("name", ROUTERS)
def test_options_are_those_of_the_class_and_its_base(name):
    options = router_options(name)
    assert {"priority", *(["bias"] if issubclass(ROUTERS[name], LinearRouter) else [])} <= set(options)
    assert not {"rngs", "width", "losses", "capacity", "self", "vocab"} & set(options)


def test_dispatchers_and_dense_networks_by_name():
    kinds = {"auto": Auto, "gather": Gather, "einsum": Einsum, "ragged": Ragged}
    assert {name: type(built(dispatcher=name).dispatcher) for name in kinds} == kinds
    assert built(wire="bfloat16", dispatcher="gather").dispatcher == Gather(wire="bfloat16")
    assert isinstance(built(shared_hidden=4).beside, Shared)
    assert isinstance(built(shared_hidden=4, shared="residual").beside, Residual)
    assert built(biases=True).experts.b_down.shape == (8, 16)


def test_the_reason_of_the_choice_is_a_line():
    assert jax.default_backend() == "cpu"
    assert dispatcher_reason(MoEConfig(hidden=128), 256) == "gather: S/H = 2.00 on cpu"
    assert "says so" in dispatcher_reason(MoEConfig(dispatcher="einsum"), 256)
    assert "dropless" in dispatcher_reason(MoEConfig(capacity_factor=None), 256)
    assert dispatcher_reason(MoEConfig(router="meo"), 256) == "blending: router meo merges experts"
