"""Writes public/: of each family a tiny model as transformers saves it, and what it makes of random tokens.

    python -m tests.oracles.make_public

in an environment that has torch (CPU) and transformers; the tests that read the files need neither. A folder of
public/ holds config.json, safetensors files (bfloat16) and expected.npz, computed in fp32:

    tokens   [b, t]
    logits   [b, t, v]
    experts  [layer, b, t, k], the choices of each MoE layer, ascending; not there for dense models
    greedy   the 64 tokens that continue the first row
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.convert.publics import (
    DEEPSEEK,
    GLM,
    GPT_OSS,
    GRANITE,
    GRANITE_SCALES,
    LLAMA3,
    LLAMA4,
    LONG,
    MIXTRAL,
    OLMOE,
    PHI,
    QWEN,
    SHARPENED,
    TIED,
    V3,
    YARN,
    chosen,
    make,
    tokens,
)  # fmt: skip

PUBLIC = Path(__file__).with_name("public")
TINY = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
MODELS = {
    "mixtral": ("mixtral", MIXTRAL | {"intermediate_size": 10, "head_dim": 6}),
    "qwen2_moe": (
        "qwen2_moe",
        QWEN | {"moe_intermediate_size": 6, "shared_expert_intermediate_size": 10, "intermediate_size": 12}
        | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        QWEN
        | {"moe_intermediate_size": 6, "head_dim": 6, "norm_topk_prob": True, "intermediate_size": 10}
        | {"num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "olmoe": ("olmoe", OLMOE | {"intermediate_size": 6, "clip_qkv": 1.0}),
    "granitemoe": ("granitemoe", GRANITE | GRANITE_SCALES | TIED | {"embedding_multiplier": 0.25}),
    "gpt_oss": ("gpt_oss", GPT_OSS | {"rope_parameters": YARN}),
    "deepseek_v2": (
        "deepseek_v2",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "deepseek_v3": ("deepseek_v3", V3 | {"rope_parameters": SHARPENED}),
    "phimoe": (
        "phimoe",
        PHI
        | {"intermediate_size": 10, "attention_bias": True, "lm_head_bias": True}
        | {"rope_parameters": LONG | {"short_factor": [1.0, 2.5], "long_factor": [2.0, 8.0], "long_mscale": 1.25}},
    ),
    "glm4_moe": (
        "glm4_moe",
        GLM | {"use_qk_norm": True, "attention_bias": True, "n_group": 4, "topk_group": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "llama4_text": (
        "llama4_text",
        LLAMA4 | {"interleave_moe_layer_step": 2, "intermediate_size": 6, "intermediate_size_mlp": 10}
        | {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
    ),
    "llama": ("llama", {"intermediate_size": 20, "attention_bias": True}),
    "qwen3": ("qwen3", {"intermediate_size": 20, "head_dim": 6}),
}  # fmt: skip


def write(name, model_type, options):
    folder = PUBLIC / name
    shutil.rmtree(folder, ignore_errors=True)
    model = make(model_type, TINY | options)
    given = tokens(2, 11) % TINY["vocab_size"]
    with torch.no_grad():
        for weight in model.parameters():  # not the buffers, as model.bfloat16() would: rotary frequencies are fp32
            weight.copy_(weight.bfloat16().float())
        logits, experts = chosen(model, given)
        greedy = model.generate(torch.from_numpy(given[:1]).long(), max_new_tokens=64, do_sample=False)
    model.bfloat16().save_pretrained(folder, max_shard_size="8KB")
    (folder / "generation_config.json").unlink()
    found = {} if experts is None else {"experts": experts.astype(np.int8)}
    greedy = greedy[0, given.shape[1] :].numpy().astype(np.int32)
    np.savez_compressed(folder / "expected.npz", tokens=given, logits=logits, greedy=greedy, **found)


def main():
    for name, (model_type, options) in MODELS.items():
        write(name, model_type, options)
    (PUBLIC / "VERSION").write_text(f"transformers {transformers.__version__}, torch {torch.__version__}\n")


if __name__ == "__main__":
    main()
