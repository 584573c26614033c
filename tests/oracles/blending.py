"""One network merged from experts, as loops in float64."""

import math

import numpy as np


def activated(activation, pre):
    if activation == "relu":
        return [max(x, 0.0) for x in pre["up"]]
    return [up * gate / (1 + math.exp(-gate)) for up, gate in zip(pre["up"], pre["gate"], strict=True)]


def network(tokens, mix, weights, activation):
    """Tokens ``[l, m]`` through the experts' mean by ``mix`` ``[e]``; ``weights`` by their names in ``Experts``."""
    merged = {
        name: sum(float(share) * np.asarray(expert, np.float64) for share, expert in zip(mix, experts, strict=True))
        for name, experts in weights.items()
    }
    rows = []
    for token in np.asarray(tokens, np.float64):
        pre = {
            name: token @ merged[f"w_{name}"] + merged.get(f"b_{name}", 0.0)
            for name in ("up", "gate")
            if f"w_{name}" in merged
        }
        rows.append(np.asarray(activated(activation, pre)) @ merged["w_down"] + merged.get("b_down", 0.0))
    return np.array(rows)


def mean(values, valid):
    """Of the real rows of ``values`` ``[s, d]``; 0 if there are none."""
    real = [np.asarray(row, np.float64) for row, here in zip(values, valid, strict=True) if here]
    return sum(real) / len(real) if real else np.zeros(np.shape(values)[1])
