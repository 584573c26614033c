"""config.json in each of its spellings, and back."""

import dataclasses

import pytest

from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.families import FAMILIES
from gshardx.convert.outgoing import form_of
from gshardx.convert.settings import difference
from gshardx.convert.source import open_source, read_config, understood
from gshardx.errors import BadInput
from tests.convert.test_public import NAMES, PUBLIC

OLD = {
    "mixtral": ({"num_local_experts"}, {"num_experts": 4}),
    "qwen3_moe": ({"num_local_experts"}, {"num_experts": 4}),
    "olmoe": ({"num_experts"}, {"num_local_experts": 8}),
}


def read(name, config):
    return understood(config, FAMILIES[name], "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_before_and_after_transformers_5(name):
    config = read_config(PUBLIC / name)
    before = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    if "partial_rotary_factor" in scaling:
        before["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    before |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    before |= {"rope_scaling": None if scaling["rope_type"] == "default" else scaling}
    gone, added = OLD.get(name, (set(), {}))
    before = {key: value for key, value in before.items() if key not in gone} | added
    assert read(name, before) == read(name, config)
    assert read(name, config).dtype == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back(name):
    """Whichever family can hold the model: Qwen3-MoE is OLMoE but for its norms, say."""
    model = open_source(PUBLIC / name).model
    form = form_of(model, 48, None, "run")
    assert form.family.name == name
    assert difference(understood(form.config, form.family, "config.json"), model) is None


def test_what_no_family_can_hold_is_said_for_each():
    model = open_source(PUBLIC / "mixtral").model
    other = dataclasses.replace(model, moe=MoEConfig(router="gshard", every=1))
    with pytest.raises(BadInput, match=r"mixtral: model.moe.router = gshard, not top_k; .*olmoe: "):
        form_of(other, 48, None, "run")
    capped = dataclasses.replace(model, logit_cap=30.0)
    with pytest.raises(BadInput, match=r"mixtral: model.logit_cap = 30.0, not None"):
        form_of(capped, 48, None, "run")


def test_biased_sigmoids_over_heads_that_turn_whole_are_glm():
    options = {"groups": 2, "groups_kept": 1, "scale": 2.5, "rate": 0.01}
    model = ModelConfig(moe=MoEConfig(router="sigmoid_bias", every=1, capacity_factor=None, router_options=options))
    form = form_of(model, 48, None, "run")
    assert (form.family.name, form.config["partial_rotary_factor"], form.config["n_group"]) == ("glm4_moe", 1.0, 2)


def test_a_run_goes_back_to_what_it_came_as_or_nowhere():
    model = open_source(PUBLIC / "mixtral").model
    assert form_of(model, 48, PUBLIC / "mixtral", "run").config == read_config(PUBLIC / "mixtral")
    other = dataclasses.replace(model, moe=dataclasses.replace(model.moe, top_k=1))
    with pytest.raises(BadInput, match=r"came as mixtral, and now has model.moe.top_k = 1, not 2"):
        form_of(other, 48, PUBLIC / "mixtral", "run")


def test_what_only_training_reads_makes_no_difference():
    model = open_source(PUBLIC / "mixtral").model
    trained = dataclasses.replace(
        model, dropout=0.1, moe=dataclasses.replace(model.moe, capacity_factor=1.25, losses={"z": 0.1})
    )
    options = {"priority": "random", "output_masking": 0.2, "token_drop": 0.1, "round_to": 8}
    trained = dataclasses.replace(trained, moe=dataclasses.replace(trained.moe, router_options=options))
    assert difference(model, trained) is None
