"""Random models of transformers, small, with and without each option of their families."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MIXTRAL = {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"intermediate_size": 20, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
OLMOE = {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3}
GRANITE = {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE_SCALES = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
GPT_OSS = {
    "intermediate_size": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 6,
    "sliding_window": 5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
DEEPSEEK = LATENT | {
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 1.5,
}
V3 = DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}
SHARPENED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [2.0, 4.0, 8.0],
    "short_mscale": 1.25,
    "long_mscale": 1.5,
    "original_max_position_embeddings": 128,
}
PHI = MIXTRAL | {"router_jitter_noise": 0.3}
GLM = {
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
    "head_dim": 8,
}
LLAMA4 = {
    "intermediate_size": 12,
    "intermediate_size_mlp": 20,
    "num_local_experts": 4,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "attention_chunk_size": 6,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
ODD_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
TIED = {"tie_word_embeddings": True}

CASES = {
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral, wide heads, tied": ("mixtral", MIXTRAL | TIED | {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "mixtral, odd heads": ("mixtral", MIXTRAL | ODD_HEADS | {"num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 16}),
    "qwen2_moe, no bias, renormalised, half dense": (
        "qwen2_moe",
        QWEN
        | {"shared_expert_intermediate_size": 16, "qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 2}
        | {"num_hidden_layers": 4},
    ),
    "qwen2_moe, dense first": (
        "qwen2_moe",
        QWEN | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [0, 1], "num_hidden_layers": 4},
    ),
    "qwen2_moe, odd heads, tied": ("qwen2_moe", QWEN | ODD_HEADS | TIED | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 8, "norm_topk_prob": True}),
    "qwen3_moe, biases, not renormalised, half dense": (
        "qwen3_moe",
        QWEN | {"head_dim": 6, "attention_bias": True, "decoder_sparse_step": 2, "rope_theta": 1e6},
    ),
    "qwen3_moe, odd heads, tied": ("qwen3_moe", QWEN | ODD_HEADS | TIED | {"head_dim": 4}),
    "olmoe": ("olmoe", OLMOE),
    "olmoe, clipped, biases, renormalised": (
        "olmoe",
        OLMOE | {"clip_qkv": 0.5, "attention_bias": True, "norm_topk_prob": True},
    ),
    "olmoe, odd heads, tied": ("olmoe", OLMOE | ODD_HEADS | TIED),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoe, scaled, biases, tied": ("granitemoe", GRANITE | GRANITE_SCALES | TIED | {"attention_bias": True}),
    "granitemoe, scaled, odd heads": ("granitemoe", GRANITE | GRANITE_SCALES | ODD_HEADS),
    "mixtral, windows, yarn": (
        "mixtral",
        MIXTRAL
        | {"head_dim": 6, "sliding_window": 5, "rope_parameters": YARN | {"truncate": True, "attention_factor": 1.25}},
    ),
    "qwen3_moe, windows": (
        "qwen3_moe",
        QWEN | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3_moe, linear": (
        "qwen3_moe",
        QWEN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}},
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS | {"rope_parameters": YARN}),
    "gpt_oss, all sliding, odd heads, tied": (
        "gpt_oss",
        GPT_OSS | ODD_HEADS | TIED | {"layer_types": ["sliding_attention"] * 2, "rope_parameters": YARN},
    ),
    "gpt_oss, no biases, every third full, not stretched": (
        "gpt_oss",
        GPT_OSS
        | {
            "attention_bias": False,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v2, groups, yarn, biases": (
        "deepseek_v2",
        DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True}
        | {"rope_parameters": SHARPENED},
    ),
    "deepseek_v2, whole queries, one shared, odd heads, tied": (
        "deepseek_v2",
        DEEPSEEK | ODD_HEADS | TIED | {"q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 0},
    ),
    "deepseek_v3": ("deepseek_v3", V3),
    "deepseek_v3, yarn, biases, no groups, not renormalised": (
        "deepseek_v3",
        V3
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "attention_bias": True}
        | {"rope_parameters": SHARPENED | {"mscale_all_dim": 1.0}},
    ),
    "deepseek_v3, whole queries, halves, odd heads, tied": (
        "deepseek_v3",
        V3 | ODD_HEADS | TIED | {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": SHARPENED},
    ),
    "phimoe": ("phimoe", MIXTRAL),
    "phimoe, all biases, longrope": (
        "phimoe",
        PHI | {"attention_bias": True, "lm_head_bias": True, "num_key_value_heads": 4, "rope_parameters": LONG},
    ),
    "phimoe, windows, odd heads, tied": (
        "phimoe",
        PHI | ODD_HEADS | TIED | {"lm_head_bias": True, "sliding_window": 5, "num_local_experts": 8, "head_dim": 6},
    ),
    "phimoe, odd heads, beyond the first length, noise": (
        "phimoe",
        PHI
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True, "input_jitter_noise": 0.1}
        | {"head_dim": 6, "rms_norm_eps": 1e-2}
        | {"rope_parameters": LONG | {"original_max_position_embeddings": 8, "short_mscale": 0.8, "long_mscale": 0.8}},
    ),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4_moe, norms, biases, groups, stretched, two shared": (
        "glm4_moe",
        GLM
        | {"use_qk_norm": True, "attention_bias": True, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
        | {"rope_parameters": YARN | {"partial_rotary_factor": 0.75}},
    ),
    "glm4_moe, odd heads, tied, not renormalised, all sparse, turned whole": (
        "glm4_moe",
        GLM
        | ODD_HEADS
        | TIED
        | {"norm_topk_prob": False, "first_k_dense_replace": 0, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
    ),
    "llama4_text": ("llama4_text", LLAMA4),
    "llama4_text, half dense, no norm, not tuned, biases, llama3": (
        "llama4_text",
        LLAMA4
        | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attn_temperature_tuning": False}
        | {"attention_bias": True, "no_rope_layer_interval": 2, "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
    ),
    "llama4_text, odd heads, tied, all turned, two experts": (
        "llama4_text",
        LLAMA4 | ODD_HEADS | TIED | {"no_rope_layers": [1, 1], "num_hidden_layers": 2, "num_experts_per_tok": 2},
    ),
    "llama4_text, nothing turned": (
        "llama4_text",
        LLAMA4 | {"no_rope_layers": [0, 0], "num_hidden_layers": 2, "attn_temperature_tuning": True},
    ),
    "llama": ("llama", {"intermediate_size": 20}),
    "llama, llama3": ("llama", {"intermediate_size": 20, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama, biases, tied": ("llama", {"intermediate_size": 20, "attention_bias": True} | TIED),
    "llama, odd heads": ("llama", {"intermediate_size": 20} | ODD_HEADS),
    "qwen3": ("qwen3", {"intermediate_size": 20, "head_dim": 8}),
    "qwen3, windows": (
        "qwen3",
        {
            "intermediate_size": 20,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
        },
    ),
    "qwen3, biases, odd heads, tied": (
        "qwen3",
        {"intermediate_size": 20, "head_dim": 4, "attention_bias": True} | ODD_HEADS | TIED,
    ),
}
"""Name to model_type and options."""


def make(model_type, options, seed=0):
    """The model in eval mode; norms and biases random too, as they start at 1 and 0."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | options)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            deviation = 0.3 if weight.ndim > 1 and "embed" not in name else 0.5 if weight.ndim > 1 else 0.2
            weight.copy_(center + deviation * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


def tokens(rows=2, length=17, seed=1):
    import numpy as np

    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length)).astype(np.int32)


def chosen(model, given):
    """Logits ``[b, t, v]``, and the experts of each MoE layer, ascending ``[layer, b, t, k]``; None of dense models."""
    import numpy as np

    from gshardx.convert.traces import trace_theirs

    found = trace_theirs(model, given)
    return found.logits, np.stack(list(found.experts.values())) if found.experts else None
