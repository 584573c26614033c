"""Hugging Face's models in PyTorch on the CPU, dropless: prints one JSON object. Needs torch and transformers only.

Mixtral, or for a shape with a shared expert Qwen2-MoE, whose shared expert has a gate.
"""

import argparse
import json
import time
from typing import Any

import torch
import transformers
from shape import SHAPES, Shape, steady_median
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

THREADS = 2
TRIAL_STEPS = 3
EXPERTS = ("eager", "grouped_mm")
"""Not batched_mm: it copies an expert's weights for every choice of every token, 13 GB a layer for Mixtral's shape."""


def build(shape: Shape, experts: str) -> PreTrainedModel:
    common = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.sequence,
        "num_experts_per_tok": shape.top_k,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "experts_implementation": experts,
    }
    if shape.shared_hidden:
        config = Qwen2MoeConfig(
            num_experts=shape.experts,
            moe_intermediate_size=shape.expert_hidden,
            shared_expert_intermediate_size=shape.shared_hidden,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            **common,
        )
        return Qwen2MoeForCausalLM(config).float().train()
    config = MixtralConfig(num_local_experts=shape.experts, intermediate_size=shape.expert_hidden, **common)
    return MixtralForCausalLM(config).float().train()


def step_seconds(shape: Shape, experts: str, steps: int) -> list[float]:
    """Durations of forward, backward and update with the given implementation of the experts."""
    torch.manual_seed(0)
    model = build(shape, experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    seconds = []
    for _ in range(steps):
        tokens = torch.randint(shape.vocab, (shape.batch, shape.sequence))
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def fastest_experts(shape: Shape) -> str:
    """Whose best step of a few is the shortest."""
    return min(EXPERTS, key=lambda experts: min(step_seconds(shape, experts, TRIAL_STEPS)))


def measure(steps: int, shape: Shape) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    experts = fastest_experts(shape)
    median = steady_median(step_seconds(shape, experts, steps))
    return {
        "tokens_per_second": shape.tokens_per_step / median,
        "median_step_seconds": median,
        "drop_fraction": 0.0,
        "note": f"{THREADS} threads; fastest experts: {experts}",
        "versions": [f"torch {torch.__version__}", f"transformers {transformers.__version__}"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral")
    args = parser.parse_args()
    print(json.dumps(measure(args.steps, SHAPES[args.shape])))
