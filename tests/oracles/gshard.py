"""GShard's Algorithm 1 (arXiv 2006.16668) as loops over tokens, written from the paper."""

import numpy as np


def route(gates, k, capacity, valid, coin=None):
    """Route one group.

    Args:
        gates: softmax over experts ``[s, e]``.
        k: choices.
        capacity: slots of an expert.
        valid: ``[s]`` False for padding.
        coin: uniform draws ``[s, k]`` for policy "random", or None for "all".

    Returns:
        experts ``[s, k]``, slots ``[s, k]``, keep ``[s, k]``, weights ``[s, k]``, auxiliary loss (1.0 at balance).
    """
    s, e = gates.shape
    experts = np.zeros((s, k), int)
    weights = np.zeros((s, k))
    for token in range(s):
        left = list(range(e))
        for rank in range(k):
            best = max(left, key=lambda expert: (gates[token, expert], -expert))
            experts[token, rank] = best
            left.remove(best)
        chosen = [gates[token, expert] for expert in experts[token]]
        weights[token] = [gate / (sum(chosen) + 1e-9) for gate in chosen]

    count = [0] * e
    first_counts = None
    slots = np.zeros((s, k), int)
    keep = np.zeros((s, k), bool)
    for rank in range(k):
        for token in range(s):
            if not valid[token]:
                continue
            expert = experts[token, rank]
            slots[token, rank] = count[expert]
            wanted = rank == 0 or coin is None or coin[token, rank] < 2 * weights[token, rank]
            keep[token, rank] = wanted and count[expert] < capacity
            count[expert] += 1
        if rank == 0:
            first_counts = list(count)

    real = max(sum(valid), 1)
    mean_gate = [sum(gates[t, x] for t in range(s) if valid[t]) / real for x in range(e)]
    loss = e * sum(first_counts[x] / real * mean_gate[x] for x in range(e))
    return experts, slots, keep, weights * keep, loss


def moe(tokens, experts, keep, weights, feed_forward):
    """Each token's weighted sum of its kept experts' outputs, one token and one expert at a time: ``[s, m]``."""
    out = np.zeros_like(tokens)
    for token in range(len(tokens)):
        for rank in range(experts.shape[1]):
            if keep[token, rank]:
                out[token] += weights[token, rank] * feed_forward(experts[token, rank], tokens[token])
    return out
