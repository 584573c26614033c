"""Phi-MoE, whose norms are layer norms, and what came with it: nothing but tables."""

from gshardx.convert.family import (
    ATTENTION,
    BIAS,
    COMMON,
    DROPLESS,
    EXPERTS,
    HIDDEN,
    LAYER,
    MIXTRAL,
    MOE_HIDDEN,
    OUTSIDE,
    PLAIN_LOGITS,
    QUANTISED,
    TOP_K,
    WHOLE_HEADS,
    WINDOW,
    Family,
)
from gshardx.convert.rope import read_longrope, write_longrope
from gshardx.convert.rules import Rule
from gshardx.convert.settings import Need, Setting

_OWN = (
    # Unlike elsewhere, positions that files say nothing of have another base, and may have factors a pair.
    Setting("rope_base", "rope_theta|rope_parameters.rope_theta", 1e6, float),
    Setting("rope", "rope_scaling|rope_parameters", lambda ours: {}, read_longrope, write_longrope),
    Setting("options.logits_bias", "lm_head_bias", False),
    Setting("moe.router_options.jitter", "router_jitter_noise", 0.01, float),
    Setting("moe.router_options.input_jitter", "input_jitter_noise", 0.0, float),
)
_BIASES = (
    Rule("model.norm.bias", "m -> m", ("final_norm.bias",)),
    Rule("lm_head.bias", "v -> v", ("logits_bias",)),
    Rule(LAYER + "input_layernorm.bias", "m -> m", ("block.attention_norm.bias",)),
    Rule(LAYER + "post_attention_layernorm.bias", "m -> m", ("block.feed_forward_norm.bias",)),
)

WITH_LAYER_NORMS = (
    Family(
        "phimoe",
        "PhimoeForCausalLM",
        (
            *(one for one in COMMON if one.ours not in ("rope", "rope_base")), *_OWN,
            PLAIN_LOGITS, BIAS, HIDDEN, MOE_HIDDEN, EXPERTS, TOP_K, WINDOW,
        ),
        (
            Need("hidden_act", ("silu",)),
            Need("rope_scaling.rope_type|rope_scaling.type|rope_parameters.rope_type", ("default", "longrope")),
            Need("num_experts_per_tok", (2,)), WHOLE_HEADS, *QUANTISED,
        ),
        {**DROPLESS, "moe.router": "sparse_mixer", "moe.every": 1, "options.norm": "layer"},
        (*OUTSIDE, *ATTENTION, *MIXTRAL, *_BIASES),
    ),
)  # fmt: skip
"""In the order in which they are tried."""
