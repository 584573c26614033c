"""The public model families that can be read and written: nothing but tables.

A family is its model_type, how its config.json says what ours does, and where each of its tensors goes. What sets
families apart in a model are options of it (docs/convert.md).
"""

import difflib
from collections.abc import Mapping
from typing import Any

from gshardx.convert.families_latent import LATENT
from gshardx.convert.families_layer_norm import WITH_LAYER_NORMS
from gshardx.convert.families_partial import PARTIAL
from gshardx.convert.families_windowed import WITH_WINDOWS
from gshardx.convert.family import (
    AS_EXPERT,
    ATTENTION,
    BIAS,
    COMMON,
    DENSE,
    DENSE_FIRST,
    DROPLESS,
    EVERY,
    EXPERTS,
    FINE_HIDDEN,
    GRANITE,
    HIDDEN,
    MIXTRAL,
    MOE,
    MOE_HIDDEN,
    NO_ROUTER,
    NORM_OF_ALL,
    NORM_OF_HEADS,
    ONE_EXPERT,
    OUTSIDE,
    PLAIN,
    PLAIN_LOGITS,
    QKV_BIAS,
    RENORMALISE,
    SHARED,
    TOP_K,
    WINDOW,
    WINDOW_IF_USED,
    WITH_WINDOW,
    Family,
)
from gshardx.convert.settings import Need, Setting
from gshardx.errors import BadInput

_TABLE = (
    Family(
        "llama",
        "LlamaForCausalLM",
        (*COMMON, PLAIN_LOGITS, BIAS, HIDDEN, MOE_HIDDEN),
        PLAIN,
        ONE_EXPERT,
        (*OUTSIDE, *ATTENTION, *AS_EXPERT),
        zeros=NO_ROUTER,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*COMMON, PLAIN_LOGITS, BIAS, HIDDEN, MOE_HIDDEN, WINDOW_IF_USED),
        (*WITH_WINDOW, Need("max_window_layers", (0,), unless=("use_sliding_window", False))),
        {**ONE_EXPERT, "attention.qk_norm": "head"},
        (*OUTSIDE, *ATTENTION, *NORM_OF_HEADS, *AS_EXPERT),
        also={"use_sliding_window": False, "max_window_layers": 0},
        zeros=NO_ROUTER,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (*COMMON, PLAIN_LOGITS, HIDDEN, MOE_HIDDEN, EXPERTS, TOP_K, WINDOW),
        WITH_WINDOW,
        {**DROPLESS, "moe.every": 1},
        (*OUTSIDE, *ATTENTION, *MIXTRAL),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (
            *COMMON, PLAIN_LOGITS, QKV_BIAS, HIDDEN, FINE_HIDDEN, EVERY, DENSE_FIRST, TOP_K, RENORMALISE,
            Setting("moe.num_experts", "num_experts|num_local_experts"),
            Setting("moe.shared_hidden", "shared_expert_intermediate_size"),
        ),
        PLAIN,
        {**DROPLESS, "moe.shared": "gated"},
        (*OUTSIDE, *ATTENTION, *DENSE, *MOE, *SHARED),
        also={"use_sliding_window": False},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (
            *COMMON, PLAIN_LOGITS, BIAS, HIDDEN, FINE_HIDDEN, EVERY, DENSE_FIRST, TOP_K, RENORMALISE,
            Setting("moe.num_experts", "num_experts|num_local_experts"), WINDOW_IF_USED,
        ),
        WITH_WINDOW,
        {**DROPLESS, "attention.qk_norm": "head"},
        (*OUTSIDE, *ATTENTION, *NORM_OF_HEADS, *DENSE, *MOE),
        also={"use_sliding_window": False},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        (
            *COMMON, PLAIN_LOGITS, BIAS, HIDDEN, MOE_HIDDEN, TOP_K, RENORMALISE,
            Setting("moe.num_experts", "num_experts|num_local_experts"),
            Setting("attention.qkv_clip", "clip_qkv", None),
        ),
        PLAIN,
        {**DROPLESS, "moe.every": 1, "attention.qk_norm": "whole"},
        (*OUTSIDE, *ATTENTION, *NORM_OF_ALL, *MOE),
    ),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        (
            *COMMON, BIAS, HIDDEN, MOE_HIDDEN, EXPERTS, TOP_K,
            Setting("scales.embedding", "embedding_multiplier", 1.0),
            Setting("scales.residual", "residual_multiplier", 1.0),
            Setting("scales.attention", "attention_multiplier", 1.0),
            Setting("scales.logits", "logits_scaling", 1.0, lambda theirs: 1.0 / theirs, lambda ours: 1.0 / ours),
        ),
        PLAIN,
        {**DROPLESS, "moe.every": 1, "moe.router_options": {"softmax": "after"}},
        (*OUTSIDE, *ATTENTION, *GRANITE),
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in (*_TABLE, *WITH_WINDOWS, *LATENT, *PARTIAL, *WITH_LAYER_NORMS)}
"""By model_type; of several that could hold a model of ours, the first does."""
OF_IMAGES_TOO = {"llama4": FAMILIES["llama4_text"]}
"""Architectures with a model of text inside."""


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json is of.

    Raises:
        BadInput: none of ours; names the nearest.
    """
    name = config.get("model_type")
    if name in FAMILIES:
        return FAMILIES[str(name)]
    if name in OF_IMAGES_TOO:
        kind = OF_IMAGES_TOO[str(name)]
        raise BadInput(
            f"{where}: model_type = {name}: of this architecture only the text model is read, {kind.name}; take it out "
            f"with transformers' {kind.architecture}.from_pretrained(...).save_pretrained(...)"
        )
    nearest = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.0)[0]
    raise BadInput(
        f"{where}: model_type = {name}: no such architecture here; the nearest is {nearest} (of {', '.join(FAMILIES)})"
    )
