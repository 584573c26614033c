"""Families by their name."""

import json
import math
from pathlib import Path

import pytest

from gshardx.convert.families import FAMILIES, family_of
from gshardx.convert.outgoing import form_of
from gshardx.convert.planned import describe
from gshardx.convert.source import understood
from gshardx.errors import BadInput

DEEPSEEK_V3 = json.loads((Path(__file__).parent / "configs" / "deepseek-v3.json").read_text())


def test_families_that_are_not_there_are_named_with_the_nearest():
    with pytest.raises(BadInput, match=r"model_type = qwen3_next: .* the nearest is qwen3"):
        family_of({"model_type": "qwen3_next"}, "config.json")
    with pytest.raises(BadInput, match="model_type = None"):
        family_of({}, "config.json")
    assert {family.architecture.endswith("ForCausalLM") for family in FAMILIES.values()} == {True}


def test_yarn_sharpens_scores_once_for_all_of_a_head_and_what_turns_by_the_rest():
    """DeepSeek-V3's scores are times (0.1 ln 40 + 1)**2; the magnitude of what turns is the ratio of both, 1."""
    config = DEEPSEEK_V3
    model = understood(config, family_of(config, "config.json"), "config.json")
    sharper = 0.1 * math.log(40) + 1
    assert model.scales["attention"] == pytest.approx(192**-0.5 * sharper**2, rel=1e-12)
    assert model.rope["magnitude"] == 1.0
    assert (model.rope["interleaved"], model.attention["kind"], model.moe.shared_hidden) == (True, "latent", 2048)
    without = {key: value for key, value in config["rope_scaling"].items() if "mscale" not in key}
    config = config | {"rope_scaling": without}
    model = understood(config, family_of(config, "config.json"), "config.json")
    assert "attention" not in model.scales
    assert "magnitude" not in model.rope


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2),
        ("quantization_config", {"quant_method": "awq"}), ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ],
)  # fmt: skip
def test_what_a_latent_model_may_not_have_is_refused_by_name(key, value):
    config = DEEPSEEK_V3 | {key: value}
    with pytest.raises(BadInput, match=rf"config.json: {key}.* is not supported yet"):
        understood(config, family_of(config, "config.json"), "config.json")


PHI = json.loads((Path(__file__).parent / "configs" / "phi-3.5-moe.json").read_text())
LONG = {"short_factor": [1.0] * 64, "long_factor": [8.0] * 64, "short_mscale": 1.25, "long_mscale": 1.5} | {
    "type": "longrope", "original_max_position_embeddings": 4096,
}  # fmt: skip


def test_longrope_is_that_of_short_texts():
    """In the keys of the hub's files; what is written for a model without them says the same of longer texts."""
    config = PHI | {"rope_scaling": LONG}
    family = family_of(config, "config.json")
    model = understood(config, family, "config.json")
    rope = {"scaling": "longrope", "factors": [1.0] * 64, "magnitude": 1.25, "original_length": 4096}
    assert model.rope == rope
    assert (model.options, model.moe.router_options) == (
        {"norm": "layer", "logits_bias": True},
        {"jitter": 0.01, "input_jitter": 0.01},
    )
    form = form_of(model, 32064, None, "run")
    assert (form.family.name, form.config["rope_scaling"]["long_mscale"]) == ("phimoe", 1.25)
    again = understood(form.config, family, "config.json")
    assert again.rope == rope
    without = understood({key: value for key, value in PHI.items() if "rope" not in key}, family, "config.json")
    assert (without.rope_base, without.rope) == (1e6, {})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok = 4 is not supported yet; supported: 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear is not supported yet; supported: default, longr"),
        ({"rope_scaling": LONG | {"short_mscale": None}}, "rope_scaling = .* can't be read"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling = .*: no short_factor in it"),
        ({"rope_scaling": LONG | {"short_factor": [1.0] * 4}}, "4 of them; 128 entries that turn need 64"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported yet"),
    ],
)
def test_what_a_model_with_layer_norms_may_not_have_is_refused_by_name(keys, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PHI | keys))
    with pytest.raises(BadInput, match=said):
        describe(tmp_path)


GLM = json.loads((Path(__file__).parent / "configs" / "glm-4.5.json").read_text())


@pytest.mark.parametrize(
    ("place", "width"),
    [
        ({"partial_rotary_factor": 0.25}, 32),
        ({"partial_rotary_factor": 1.0}, 128),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.75}}, 96),
        ({}, 64),
    ],
)
def test_a_part_of_each_head_turns_as_configs_of_either_generation_say(place, width):
    config = {key: value for key, value in GLM.items() if key != "partial_rotary_factor"} | place
    model = understood(config, family_of(config, "config.json"), "config.json")
    assert model.rope["width"] == width


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.3), ("rope_scaling", {"rope_type": "longrope"}), ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "compressed-tensors"}),
    ],
)  # fmt: skip
def test_what_glm_may_not_have_is_refused_by_name(key, value):
    config = GLM | {key: value, "head_dim": 130 if key == "partial_rotary_factor" else 128}
    with pytest.raises(BadInput, match=rf"config.json: {key}.* supported: "):
        understood(config, family_of(config, "config.json"), "config.json")


SCOUT = json.loads((Path(__file__).parent / "configs" / "llama-4-scout-text.json").read_text())


@pytest.mark.parametrize(
    ("said", "every"),
    [
        ({}, 4),
        ({"no_rope_layer_interval": 3}, 3),
        ({"no_rope_layers": [1, 0] * 24, "layer_types": ["chunked_attention", "full_attention"] * 24}, 2),
        ({"no_rope_layers": [1] * 50}, None),
    ],
)
def test_llama_4_turns_nothing_in_every_nth_layer(said, every):
    config = SCOUT | said
    model = understood(config, family_of(config, "config.json"), "config.json")
    assert model.attention.get("full_every") == every
    assert (model.attention["chunk"], model.attention["temperature_floor"]) == (8192, 8192)


def test_the_hub_counts_where_transformers_says_true():
    config = SCOUT | {"attn_temperature_tuning": 4, "moe_layers": list(range(1, 48, 2))}
    model = understood(config, family_of(config, "config.json"), "config.json")
    assert (model.attention["temperature_floor"], model.moe.every) == (8192, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("no_rope_layers", [0] + [1] * 47), ("layer_types", ["chunked_attention"] * 48), ("moe_layers", [0, 3]),
        ("moe_layers", []), ("attention_chunk_size", None), ("rope_scaling", {"rope_type": "longrope"}),
        ("hidden_act", "gelu"), ("quantization_config", {"quant_method": "awq"}),
    ],
)  # fmt: skip
def test_what_llama_4_may_not_have_is_refused_by_name(key, value):
    config = SCOUT | {key: value}
    with pytest.raises(BadInput, match=rf"config.json: (no )?{key}"):
        understood(config, family_of(config, "config.json"), "config.json")


def test_of_a_model_of_images_too_a_line_says_that_only_its_text_model_is_read():
    with pytest.raises(BadInput, match=r"model_type = llama4: .* only the text model is read, llama4_text; .*CausalLM"):
        family_of({"model_type": "llama4"}, "config.json")
