"""Writes huggingface.npz: the MoE blocks of transformers with random weights, and what they make of random tokens.

    python -m tests.oracles.make_huggingface

in an environment that has torch (CPU) and transformers; the tests that read the file need neither. Arrays are named
``<model>/<what>``:

    options                 the block's configuration, JSON
    weights/<name>          as in the block's state_dict, untransposed
    input, output           [b, t, m]
    logits                  [b * t, e], of the router
    experts                 [b * t, k], its choices, ascending
    dropped                 how many tokens were beyond an expert's capacity (Switch)
    balance, balance_masked load_balancing_loss_func of the logits, over all tokens and over those of ``mask``
    z                       router_z_loss_func of the logits (Switch)
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURE = Path(__file__).with_name("huggingface.npz")
SEED, BATCH, TIME, WIDTH = 0, 2, 9, 16
MASK = np.arange(TIME) < np.asarray([[TIME], [5]])

# Of each module of transformers.models.
CLASSES = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock"),
    "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock"),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2Moe"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE"),
    "gpt_oss": ("GptOssConfig", "GptOssMLP"),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeMoE"),
    "llama4": ("Llama4TextConfig", "Llama4TextMoe"),
    "switch_transformers": ("SwitchTransformersConfig", "SwitchTransformersSparseMLP"),
}

# Module and options; groups of DeepSeek-V3 hold four experts, since its score of a group adds up the best two.
MODELS = {
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 12}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}
        | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 8},
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False, "intermediate_size": 8},
    ),
    "deepseek_v2_greedy": (
        "deepseek_v2",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "greedy", "routed_scaling_factor": 1.0}
        | {"moe_intermediate_size": 8, "n_shared_experts": 2},
    ),
    "deepseek_v2_groups": (
        "deepseek_v2",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy"}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
        | {"moe_intermediate_size": 8, "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"moe_intermediate_size": 8, "n_shared_experts": 2},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 8}
        | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    "granite_moe": ("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 8}),
    "llama4": ("llama4", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 12}),
    "switch": ("switch_transformers", {"num_experts": 4, "expert_capacity": 2, "d_ff": 12}),
}

# Of random weights. 0.3 gives logits and outputs of about 1; where options make more of them, the last matrix is small.
DEVIATION = 0.3
DEVIATIONS = {
    "deepseek_v2_groups/experts.down_proj": 0.05,
    "gpt_oss/experts.gate_up_proj": 1.0,  # some hidden units pass the clamps
    "gpt_oss/experts.down_proj": 0.05,
}


def make_block(module, options):
    """The block in eval mode, with transformers' plain loop over experts, and the file that it is in."""
    config_class, block_class = CLASSES[module]
    config = getattr(transformers, config_class)(
        hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=2, **options
    )
    config._experts_implementation = "eager"
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    return getattr(modeling, block_class)(config).float().eval(), modeling


def randomise(model, block, rng):
    """Fill every weight and buffer, in the order of their names; return them by name."""
    weights = {}
    for name, tensor in sorted(block.state_dict().items()):
        deviation = DEVIATIONS.get(f"{model}/{name}", DEVIATION)
        weights[name] = rng.normal(0, deviation, tuple(tensor.shape)).astype(np.float32)
        tensor.copy_(torch.from_numpy(weights[name]))
    return weights


def choices(module, routed, k):
    """Logits ``[b * t, e]`` and experts ``[b * t, k]``, from what a router returned."""
    if module == "llama4":
        return routed[1], routed[1].topk(k, dim=-1).indices
    if module == "switch_transformers":
        logits = routed[2].flatten(0, 1)
        return logits, logits.argmax(-1, keepdim=True)
    logits, _, experts = routed
    return logits, experts


def losses(module, modeling, logits, experts):
    """The auxiliary losses that are in the model's own file."""
    if module == "switch_transformers":
        by_sequence = logits.reshape(BATCH, TIME, -1)
        balance = modeling.load_balancing_loss_func(by_sequence.softmax(-1), experts.reshape(BATCH, TIME))
        return {"balance": balance, "z": modeling.router_z_loss_func(by_sequence)}
    if not hasattr(modeling, "load_balancing_loss_func"):
        return {}
    arguments = ((logits,), logits.shape[-1], experts.shape[-1])
    masked = modeling.load_balancing_loss_func(*arguments, torch.from_numpy(MASK.astype(np.float32)))
    return {"balance": modeling.load_balancing_loss_func(*arguments), "balance_masked": masked}


def record(model, module, options, rng):
    """All arrays of one model."""
    block, modeling = make_block(module, options)
    arrays = {f"weights/{name}": value for name, value in randomise(model, block, rng).items()}
    seen = []
    router = block.gate if hasattr(block, "gate") else block.router
    router.register_forward_hook(lambda _, __, routed: seen.append(routed))
    x = rng.normal(0, 1, (BATCH, TIME, WIDTH)).astype(np.float32)
    out = block(torch.from_numpy(x.copy()))
    out = out[0] if isinstance(out, tuple) else out
    logits, experts = choices(module, seen[0], options.get("num_experts_per_tok", 1))
    arrays |= {"input": x, "output": out.reshape(x.shape), "logits": logits, "experts": experts.sort(-1).values}
    if module == "switch_transformers":
        arrays["dropped"] = BATCH * TIME - seen[0][0].sum()
    arrays |= losses(module, modeling, logits, experts)
    arrays["options"] = json.dumps(options)
    return {f"{model}/{name}": np.asarray(value) for name, value in arrays.items()}


def main(path=FIXTURE):
    arrays = {"transformers": np.asarray(transformers.__version__), "mask": MASK}
    with torch.no_grad():
        for number, (model, (module, options)) in enumerate(MODELS.items()):
            arrays |= record(model, module, options, np.random.default_rng([SEED, number]))
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
