"""Families whose layers see windows or chunks of the text, and others that came with these: nothing but tables."""

from gshardx.convert.family import (
    ATTENTION,
    COMMON,
    DROPLESS,
    EXPERTS,
    HIDDEN,
    LAYER,
    MLP,
    MOE_HIDDEN,
    NEEDS,
    OUTSIDE,
    PLAIN_LOGITS,
    QUANTISED,
    TOP_K,
    WHOLE_HEADS,
    WINDOW,
    Family,
    full_layers,
)
from gshardx.convert.rules import Rule
from gshardx.convert.settings import Need, Setting

_EXPERTS = "sparse.feed_forward.experts."
_ROUTER = "sparse.feed_forward.router."
_GPT_OSS = (
    Rule(LAYER + "self_attn.sinks", "n -> n", ("block.attention.sinks",)),
    Rule(MLP + "router.weight", "e m -> m e", (_ROUTER + "kernel",)),
    Rule(MLP + "router.bias", "e -> e", (_ROUTER + "bias",)),
    Rule(MLP + "experts.gate_up_proj", "e m (h p) -> p e m h", (_EXPERTS + "w_gate", _EXPERTS + "w_up")),
    Rule(MLP + "experts.gate_up_proj_bias", "e (h p) -> p e h", (_EXPERTS + "b_gate", _EXPERTS + "b_up")),
    Rule(MLP + "experts.down_proj", "e h m -> e h m", (_EXPERTS + "w_down",)),
    Rule(MLP + "experts.down_proj_bias", "e m -> e m", (_EXPERTS + "b_down",)),
)

WITH_WINDOWS = (
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        (
            *COMMON, PLAIN_LOGITS, HIDDEN, MOE_HIDDEN, EXPERTS, TOP_K, WINDOW, full_layers("sliding_attention", 2),
            Setting(
                "attention.biases", "attention_bias", "qkvo", lambda yes: "qkvo" if yes else "none",
                lambda ours: ours == "qkvo",
            ),
        ),
        (
            *NEEDS, WHOLE_HEADS, *QUANTISED,
            Need("swiglu_alpha", (1.702,)), Need("swiglu_limit", (7.0,)),
        ),
        {
            **DROPLESS, "moe.every": 1, "moe.biases": True, "activation": "clamped_swiglu", "attention.sinks": True,
            "moe.router_options": {"softmax": "after", "bias": True},
        },
        (*OUTSIDE, *ATTENTION, *_GPT_OSS),
    ),
)  # fmt: skip
"""In the order in which they are tried."""
