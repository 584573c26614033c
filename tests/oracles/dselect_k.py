"""DSelect-k (arXiv 2106.03760) as loops over tokens, selectors and binary digits in float64."""

import math

import numpy as np

from tests.oracles import choice


def smooth_step(x, gamma):
    if abs(x) >= gamma / 2:
        return float(x > 0)
    return -2 * x**3 / gamma**3 + 3 * x / (2 * gamma) + 0.5


def selectors(z, e, k, gamma):
    """``[k, e]`` of one token, its ``z`` being ``k`` rows of digits."""
    digits = math.ceil(math.log2(e))
    found = np.ones((k, e))
    for i in range(k):
        for expert in range(e):
            for j, digit in enumerate(format(expert, f"0{digits}b")):
                step = smooth_step(float(z[i * digits + j]), gamma)
                found[i, expert] *= step if digit == "1" else 1 - step
    return found


def route(raw, e, k, most, capacity, valid, *, gamma=1.0, priority="position"):
    """Route one group by its products ``[s, k * digits + k]``."""
    s = len(raw)
    experts, weights = np.zeros((s, most), int), np.zeros((s, most))
    all_weights, found = np.zeros((s, e)), np.zeros((s, k, e))
    for token, row in enumerate(np.asarray(raw, np.float64)):
        found[token] = selectors(row[:-k], e, k, gamma)
        for i, share in enumerate(choice.softmax(row[-k:])):
            all_weights[token] += share * found[token, i]
        experts[token] = choice.best(list(all_weights[token]), most)
        weights[token] = all_weights[token][experts[token]]
    made = weights > 0
    wanted = made & np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, choice.token_order(all_weights, priority))
    keep = wanted & (slots < capacity)
    real = max(int(np.sum(valid)), 1)
    own = found[np.asarray(valid)]
    losses = {
        "balance": choice.balance(all_weights, experts, valid, made),
        "z": choice.z(np.asarray(raw)[:, -k:], valid),
        "selector_entropy": float(np.sum(-own * np.log(own + 1e-6))) / real,
        "selector_reach": float(np.sum(1 / (own.sum(-1) + 1e-6))) / real,
    }
    margin = min(choice.order_margin(all_weights, priority), min(choice.gap(list(row)) for row in all_weights))
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
