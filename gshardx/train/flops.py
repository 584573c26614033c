"""Useful FLOPs of a step, and the rate to hold them against."""

import math

import jax

from gshardx.config import ModelConfig
from gshardx.models.attention import matrices as projections
from gshardx.models.attention import widths
from gshardx.models.moe import router_matrices
from gshardx.sharding.chips import chip_of, matmul_rate


def forward_flops_per_token(config: ModelConfig, vocab: int, sequence_length: int) -> tuple[float, float]:
    """FLOPs of a token's forward pass: outside the experts, and in its k experts if none is dropped.

    Matrix products only, 2 FLOPs a multiply-add; attention counts the causal half of the scores.
    """
    m, moe = config.width, config.moe
    matrices = 3 if config.activation.endswith("glu") else 2
    attention = sum(2 * one.inputs * one.outputs for one in projections(config))
    attention += config.heads * sum(widths(config)) * sequence_length
    sparse_layers = config.moe_layers
    dense = 2 * matrices * m * config.hidden * (config.layers - sparse_layers)
    dense += 2 * matrices * m * moe.shared_hidden * sparse_layers
    router = 2 * sum(map(math.prod, router_matrices(config))) * sparse_layers
    experts = 2 * matrices * m * moe.hidden * moe.top_k * sparse_layers
    return attention * config.layers + dense + router + 2 * m * vocab, experts


def peak_flops(devices: int) -> tuple[float, str]:
    """FLOP/s of ``devices`` devices and where the figure is from: a data sheet, or a matrix product timed here."""
    device = jax.devices()[0]
    chip = chip_of(device)
    if chip is not None:
        return chip.peak_flops * devices, f"{devices} x {device.device_kind}, bf16 data sheet"
    return matmul_rate(device), "fp32 matrix product measured at start"
