"""gshardx's engine decoding greedily from random weights, and what bounds it. One engine a process."""

import math
import resource
import statistics
import threading
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from shape import Shape

from gshardx.config import ModelConfig, MoEConfig
from gshardx.data.tokenizer import build_tokenizer
from gshardx.infer.engine import Engine
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.settings import EngineConfig
from gshardx.models.build import Variables, blueprint
from gshardx.sharding import MeshConfig, build_mesh, simulate_devices
from gshardx.sharding.guard import count_compiles
from gshardx.sharding.startup import keep_compiled, keep_memory

PROMPT, NEW, ROUNDS = 64, 128, 3
"""Tokens of each prompt and after it, and how often."""


def model_config(shape: Shape) -> ModelConfig:
    moe = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, every=1, router="top_k", hidden=shape.expert_hidden)
    return ModelConfig(
        layers=shape.layers, width=shape.width, heads=shape.heads, kv_heads=shape.kv_heads,
        head_dim=shape.head_dim, moe=moe,
    )  # fmt: skip


def measure(shape: Shape, batches: list[int], **options: Any) -> dict[str, Any]:
    """Decoded tokens a second by batch, the time of prompts left out; ``options`` are of :class:`EngineConfig`."""
    begin = time.perf_counter()
    keep_memory()
    keep_compiled()
    simulate_devices(1)
    mesh = build_mesh(MeshConfig())
    plan = blueprint(model_config(shape), shape.vocab, mesh)
    variables = Variables(plan.init(jax.random.key(0)), plan.init_router())
    start = time.perf_counter()
    config = EngineConfig(slots=max(batches), max_length=PROMPT + NEW, **options)
    with count_compiles() as count:
        engine = Engine(plan, variables, mesh, build_tokenizer("bytes", 0, []), config)
    ready = time.perf_counter() - start
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, shape.vocab, PROMPT).astype(np.int32) for _ in range(max(batches))]
    answer(engine, prompts[:1], 1)
    first_token = time.perf_counter() - begin
    speeds = {}
    for batch in batches:
        engine.stats.drawn_tokens = engine.stats.tokens = engine.stats.padded_tokens = 0
        found = [decoding(engine, prompts[:batch]) for _ in range(ROUNDS)]
        speeds[batch] = {
            "tokens_per_second": statistics.median(found),
            "padded_over_true": engine.stats.padded_tokens / engine.stats.tokens,
            "roofline": batch * bandwidth() / bytes_of_a_step(shape, batch),
        }
    return {
        "batches": speeds,
        "start_seconds": ready,
        "first_token_seconds": first_token,
        "programs": len(engine.programs),
        "compiled": len(count.compiled),
        "guesses": f"{engine.stats.accepted_tokens:,} of {engine.stats.guessed_tokens:,}",
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": [f"jax {version('jax')}"],
    }


def answer(engine: Engine, prompts: list[np.ndarray], tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_end=True)
        engine.submit(Request(str(number), prompt, params, family=time.perf_counter()))
    for _ in engine.run():
        pass


def decoding(engine: Engine, prompts: list[np.ndarray]) -> float:
    """The whole less the same with one token each."""
    start = time.perf_counter()
    answer(engine, prompts, 1)
    middle = time.perf_counter()
    answer(engine, prompts, NEW)
    return len(prompts) * (NEW - 1) / (time.perf_counter() - middle - (middle - start))


def bytes_of_a_step(shape: Shape, batch: int) -> float:
    """What must be read to write a token for each of ``batch`` sequences: all but experts once, experts that somebody
    chose (expected, choices being even), and keys and values of half the new tokens beside the prompt."""
    attention = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    expert = 3 * shape.width * shape.expert_hidden
    chosen = shape.experts * (1 - math.pow(1 - shape.top_k / shape.experts, batch))
    cache = 2 * batch * shape.kv_heads * shape.head_dim * (PROMPT + NEW / 2)
    a_layer = attention + shape.width * shape.experts + chosen * expert + cache
    return 4 * (shape.layers * a_layer + shape.width * shape.vocab)


def bandwidth() -> float:
    """Bytes a second that two threads read: the best of some dot products of arrays beyond any cache."""
    halves = [(np.ones(1 << 25, np.float32), np.ones(1 << 25, np.float32)) for _ in range(2)]

    def once() -> float:
        threads = [threading.Thread(target=np.dot, args=pair) for pair in halves]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    return sum(a.nbytes + b.nbytes for a, b in halves) / min(once() for _ in range(5))
