"""transformers' grouped experts, with routing, in bf16: prints one JSON object. Needs torch and transformers only."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from gpu_shapes import LOADS, SHAPES, SMALL_SHAPES, SMALL_TOKENS, TOKENS, LayerShape, logit_bias
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"


class Block(torch.nn.Module):
    """Mixtral's block, whose router gets a bias, so that loads are those of the other rows."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        config = MixtralConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            experts_implementation="grouped_mm",
        )
        self.top_k = shape.top_k
        self.experts = MixtralExperts(config)
        self.gate = torch.nn.Linear(shape.width, shape.experts)
        for weight in (self.experts.gate_up_proj, self.experts.down_proj, self.gate.weight):
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = torch.softmax(self.gate(x).float(), dim=-1)
        weights, chosen = torch.topk(gates, self.top_k, dim=-1)
        return self.experts(x, chosen, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))


def rows_of(shape: LayerShape, tokens: int, rounds: int, iterations: int, device: str) -> list[dict[str, Any]]:
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        block = Block(shape)
        x = torch.randn(tokens, shape.width, requires_grad=True)
        gradient = torch.randn(tokens, shape.width)

    def forward() -> None:
        with torch.no_grad():
            block(x)

    def both() -> None:
        block.zero_grad()
        block(x).backward(gradient)

    rows = []
    for load in LOADS:
        with torch.no_grad():
            block.gate.bias.copy_(torch.from_numpy(logit_bias(load, shape.experts)))
        row = {"shape": shape.name, "tokens": tokens, "load": load}
        row["forward"] = median_seconds(forward, rounds, iterations, device)
        row["both"] = median_seconds(both, rounds, iterations, device) if shape.backward else None
        rows.append(row)
    return rows


def median_seconds(action: Callable[[], None], rounds: int, iterations: int, device: str) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(iterations):
            action()
        wait()
        seconds.append((time.perf_counter() - start) / iterations)
    return statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        print("torch sees no CUDA device", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    for shape in SMALL_SHAPES if args.small else SHAPES:
        for tokens in SMALL_TOKENS if args.small else TOKENS:
            try:
                rows += rows_of(shape, tokens, args.rounds, args.iterations, device)
            except (RuntimeError, ImportError) as error:
                reason = str(error).splitlines()[0]
                rows += [{"shape": shape.name, "tokens": tokens, "load": load, "error": reason} for load in LOADS]
    print(json.dumps({"versions": VERSIONS, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
