"""DeepSeek-V2 and V3, whose heads are made from one latent vector a token: nothing but tables."""

import math
from collections.abc import Mapping
from typing import Any

from gshardx.convert.family import (
    DENSE,
    FINE_HIDDEN,
    HIDDEN,
    LAYER,
    MLP,
    MOE,
    OUTSIDE,
    PLAIN_LOGITS,
    QUANTISED,
    TOP_K,
    Family,
)
from gshardx.convert.rope import read_rope, write_rope
from gshardx.convert.rules import Rule
from gshardx.convert.settings import Need, Setting

Theirs = Mapping[str, Any]
_HEAD = ("attention.nope_dim", "attention.rope_dim")


def _is_yarn(theirs: Theirs) -> bool:
    return bool(theirs.get("rope_type", theirs.get("type")) == "yarn")


def _grown(factor: float, by: float) -> float:
    """YaRN's ``mscale``: how much sharper scores become where texts are ``factor`` times longer."""
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_score_scale(theirs: Theirs, nope_dim: int, rope_dim: int) -> float | None:
    """1 / sqrt(width of a head's queries), sharpened twice by YaRN: once for queries, once for keys."""
    if not (_is_yarn(theirs) and theirs.get("mscale_all_dim")):
        return None
    sharper = _grown(theirs["factor"], theirs["mscale_all_dim"])
    return float((nope_dim + rope_dim) ** -0.5 * sharper * sharper)


def _write_rope(ours: Theirs, scale: float | None, nope_dim: int, rope_dim: int) -> dict[str, Any] | None:
    theirs = write_rope(ours)
    if theirs is None or scale is None or ours["factor"] <= 1:
        return theirs
    sharper = math.sqrt(scale * (nope_dim + rope_dim) ** 0.5)
    return theirs | {"mscale_all_dim": round((sharper - 1) / (0.1 * math.log(ours["factor"])), 9)}


ROUTED = (
    Setting("moe.num_experts", "n_routed_experts|num_local_experts|num_experts"),
    Setting("moe.dense_first", "first_k_dense_replace", 0),
    Setting(
        "moe.shared_hidden", "n_shared_experts", 0, lambda count, hidden: count * hidden,
        lambda units, hidden: units // hidden, beside=("moe.hidden",),
    ),
    Setting("moe.router_options.scale", "routed_scaling_factor", 1.0, float),
)  # fmt: skip
_SETTINGS = (
    Setting("width", "hidden_size"),
    Setting("layers", "num_hidden_layers"),
    Setting("heads", "num_attention_heads"),
    Setting("kv_heads", "num_key_value_heads", lambda ours: ours["heads"]),  # as many: each head has keys of its own
    Setting("vocab_size", "vocab_size"),
    Setting("norm_epsilon", "rms_norm_eps"),
    Setting("rope_base", "rope_theta|rope_parameters.rope_theta", 10_000.0, float),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    PLAIN_LOGITS, HIDDEN, FINE_HIDDEN, TOP_K,
    Setting("attention.q_rank", "q_lora_rank", None),
    Setting("attention.kv_rank", "kv_lora_rank"),
    Setting("attention.nope_dim", "qk_nope_head_dim"),
    Setting("attention.rope_dim", "qk_rope_head_dim"),
    Setting("attention.value_dim", "v_head_dim"),
    Setting("attention.biases", "attention_bias", False),
    # Both read the same key of theirs, and the second writes it.
    Setting("scales.attention", "rope_scaling|rope_parameters", None, _read_score_scale, lambda *_: None, beside=_HEAD),
    Setting(
        "rope", "rope_scaling|rope_parameters", lambda ours: {}, lambda theirs, *_: read_rope(theirs), _write_rope,
        beside=("scales.attention", *_HEAD),
    ),
    *ROUTED,
)  # fmt: skip
GROUPS = (
    Setting("moe.router_options.groups", "n_group", 1),
    Setting("moe.router_options.groups_kept", "topk_group", 1),
)
RENORMALISED = Setting("moe.router_options.renormalise", "norm_topk_prob", True)
_NEEDS = (
    Need("hidden_act", ("silu",)),
    Need("rope_scaling.rope_type|rope_scaling.type|rope_parameters.rope_type", ("default", "yarn")),
    Need("moe_layer_freq", (1,)),
    Need("mlp_bias", (False,)),
    *QUANTISED,
)

_SELF = LAYER + "self_attn."
_ATTENTION = (
    Rule(LAYER + "input_layernorm.weight", "m -> m", ("block.attention_norm.scale",)),
    Rule(_SELF + "q_proj.weight", "(n c) m -> m n c", ("block.attention.w_q",)),
    Rule(_SELF + "q_a_proj.weight", "a m -> m a", ("block.attention.w_q_a",)),
    Rule(_SELF + "q_a_proj.bias", "a -> a", ("block.attention.b_q_a",)),
    Rule(_SELF + "q_a_layernorm.weight", "a -> a", ("block.attention.q_norm.scale",)),
    Rule(_SELF + "q_b_proj.weight", "(n c) a -> a n c", ("block.attention.w_q_b",)),
    Rule(_SELF + "kv_a_proj_with_mqa.weight", "k m -> m k", ("block.attention.w_kv_a",)),
    Rule(_SELF + "kv_a_proj_with_mqa.bias", "k -> k", ("block.attention.b_kv_a",)),
    Rule(_SELF + "kv_a_layernorm.weight", "r -> r", ("block.attention.kv_norm.scale",)),
    Rule(_SELF + "kv_b_proj.weight", "(n u) r -> r n u", ("block.attention.w_kv_b",)),
    Rule(_SELF + "o_proj.weight", "m (n w) -> n w m", ("block.attention.w_o",)),
    Rule(_SELF + "o_proj.bias", "m -> m", ("block.attention.b_o",)),
    Rule(LAYER + "post_attention_layernorm.weight", "m -> m", ("block.feed_forward_norm.scale",)),
)
_BESIDE = "sparse.feed_forward.beside.feed_forward."
TOGETHER = (
    Rule(MLP + "shared_experts.gate_proj.weight", "s m -> m s", (_BESIDE + "w_gate",)),
    Rule(MLP + "shared_experts.up_proj.weight", "s m -> m s", (_BESIDE + "w_up",)),
    Rule(MLP + "shared_experts.down_proj.weight", "m s -> s m", (_BESIDE + "w_down",)),
)
_RULES = (*OUTSIDE, *_ATTENTION, *DENSE, *MOE, *TOGETHER)
BALANCED = {"moe.router": "sigmoid_bias", "moe.every": 1, "moe.capacity_factor": None, "moe.losses": {"balance": 1e-4}}
BALANCE = Rule(MLP + "gate.e_score_correction_bias", "e -> e", ("state.0",))
LOAD = "router.1"
"""Of the router's state: the load since the last step."""
_FIXED = {"attention.kind": "latent", "moe.every": 1, "moe.capacity_factor": None}

LATENT = (
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        (*_SETTINGS, *(one._replace(only=("topk_method", "group_limited_greedy")) for one in GROUPS)),
        (
            *_NEEDS, Need("topk_method", ("greedy", "group_limited_greedy")), Need("scoring_func", ("softmax",)),
            Need("norm_topk_prob", (False,)),
        ),
        {
            **_FIXED, "moe.router": "top_k", "moe.router_options.renormalise": False, "rope.interleaved": True,
        },
        _RULES,
        also={"norm_topk_prob": False},
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        (
            *_SETTINGS, *GROUPS, RENORMALISED,
            Setting("rope.interleaved", "rope_interleave", True),
        ),
        (*_NEEDS, Need("topk_method", ("noaux_tc",)), Need("scoring_func", ("sigmoid",))),
        {**_FIXED, **BALANCED},
        (*_RULES, BALANCE),
        zeros=(LOAD,),
        layers_after="num_nextn_predict_layers|num_mtp_layers",
    ),
)  # fmt: skip
"""In the order in which they are tried."""
