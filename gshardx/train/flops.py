"""Useful FLOPs of a step, and the rate to hold them against."""

import time

import jax
import jax.numpy as jnp

from gshardx.config import ModelConfig

PEAK_BF16 = {
    # Dense bf16 FLOP/s of one device, from the vendors' data sheets.
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def forward_flops_per_token(config: ModelConfig, vocab: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of a token's forward pass: outside the experts, and in its k experts if none is dropped.

    Matrix products only, 2 FLOPs a multiply-add; attention counts the causal half of the scores.
    """
    m, d, moe = config.width, config.head_dim, config.moe
    matrices = 3 if config.activation.endswith("glu") else 2
    attention = 2 * m * d * (2 * config.heads + 2 * config.kv_heads) + 2 * config.heads * d * sequence_length
    sparse_layers = config.layers // moe.every
    dense = 2 * matrices * m * config.hidden * (config.layers - sparse_layers)
    dense += 2 * matrices * m * moe.shared_hidden * sparse_layers
    router = 2 * m * moe.num_experts * sparse_layers
    experts = 2 * matrices * m * moe.hidden * moe.top_k * sparse_layers
    return attention * config.layers + dense + router + 2 * m * vocab, experts


def peak_flops(devices: int) -> tuple[float, str]:
    """FLOP/s of ``devices`` devices and where the figure is from: a data sheet, or a matrix product timed here."""
    kind = jax.devices()[0].device_kind
    if kind in PEAK_BF16:
        return PEAK_BF16[kind] * devices, f"{devices} x {kind}, bf16 data sheet"
    return _measured_matmul(), "fp32 matrix product measured at start"


def _measured_matmul(size: int = 1024, repeats: int = 5) -> float:
    """Best FLOP/s of a square fp32 product on one device; simulated devices share the machine that it measures."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot).lower(a, a).compile()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
