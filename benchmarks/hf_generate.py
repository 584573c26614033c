"""Hugging Face's Mixtral generating on the CPU: prints one JSON object. Needs torch and transformers only."""

import argparse
import json
import statistics
import time

import torch
import transformers
from hf_train import THREADS, build
from shape import MIXTRAL

PROMPT, NEW = 64, 128
"""Tokens of each prompt, and after it."""


def tokens_per_second(batch: int, experts: str, tokens: int) -> float:
    """Of decoding alone: the time of the whole less that of the prompt."""
    torch.manual_seed(0)
    model = build(MIXTRAL, experts).eval()
    model.config.use_cache = model.generation_config.use_cache = True
    model.config.output_router_logits = False
    prompt = torch.randint(MIXTRAL.vocab, (batch, PROMPT))

    def seconds(new: int) -> float:
        options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return time.perf_counter() - start

    seconds(2)
    pairs = [(seconds(1), seconds(tokens)) for _ in range(3)]
    return statistics.median(batch * (tokens - 1) / (whole - first) for first, whole in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    batch = parser.parse_args().batch
    torch.set_num_threads(THREADS)
    trial = 1 + max(8, NEW // batch)  # a second or so each
    tried = {experts: tokens_per_second(batch, experts, trial) for experts in ("eager", "grouped_mm", "batched_mm")}
    best = max(tried, key=lambda name: tried[name])
    print(
        json.dumps(
            {
                "tokens_per_second": tokens_per_second(batch, best, NEW),
                "note": f"Hugging Face, batch {batch}: {THREADS} threads; fastest experts: {best}",
                "versions": [f"torch {torch.__version__}", f"transformers {transformers.__version__}"],
            }
        )
    )


if __name__ == "__main__":
    main()
