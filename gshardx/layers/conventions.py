"""Coefficients of balance losses from other projects, whose losses are scaled otherwise."""

from collections.abc import Mapping
from typing import Literal

Convention = Literal["gshardx", "gshard", "lingvo", "switch", "megatron", "huggingface", "maxtext", "flaxformer"]

AT_BALANCE: Mapping[Convention, str] = {
    "gshardx": "1",
    "gshard": "1 / e**2",  # Algorithm 1: (1 / E) sum_e (c_e / S) m_e
    "lingvo": "1",  # gshard_layers.py, Top2GatingOnLogits: first choices, times E**2
    "switch": "1",  # arXiv 2101.03961 eq. 4
    "megatron": "1",  # all choices, divided by k
    "huggingface": "k",  # load_balancing_loss_func: choices summed over ranks, not divided by k
    "maxtext": "k",
    "flaxformer": "k",
}
"""What each project's balance loss is at perfect balance, as read in its code."""


def coefficient_from(convention: Convention, coefficient: float, num_experts: int, top_k: int) -> float:
    """Our coefficient that weighs as much as ``coefficient`` does in ``convention``."""
    value = {"1": 1.0, "k": float(top_k), "1 / e**2": num_experts**-2.0}[AT_BALANCE[convention]]
    return coefficient * value
