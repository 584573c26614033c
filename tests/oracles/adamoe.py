"""AdaMoE (arXiv 2406.13233) as loops over tokens and experts: null experts after the true ones."""

import numpy as np

from tests.oracles import choice


def balance(gates, experts, real, num_experts):
    """The paper's: a true expert's f is its share of the choices, a null's the mean of all nulls' shares."""
    both, tokens = len(gates[0]), [token for token in range(len(gates)) if real[token]]
    share, mean = [0.0] * both, [0.0] * both
    for token in tokens:
        for expert in experts[token]:
            share[expert] += 1 / (len(tokens) * experts.shape[1])
        for expert in range(both):
            mean[expert] += gates[token][expert] / len(tokens)
    null_share = sum(share[num_experts:]) / (both - num_experts)
    return both * sum((share[i] if i < num_experts else null_share) * mean[i] for i in range(both))


def route(logits, k, capacity, valid, *, num_experts, priority="position"):
    """Route one group by its logits ``[s, e + n]``."""
    s = len(logits)
    gates = [choice.softmax(row) for row in logits]
    experts, weights, wanted = np.zeros((s, k), int), np.zeros((s, k)), np.zeros((s, k), bool)
    for token in range(s):
        experts[token] = choice.best(list(logits[token]), k)
        true = [rank for rank in range(k) if experts[token, rank] < num_experts]
        for rank, weight in zip(true, choice.softmax(logits[token, experts[token, true]]) if true else [], strict=True):
            weights[token, rank], wanted[token, rank] = weight, valid[token]
    slots, _ = choice.number(experts, wanted, num_experts, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": balance(gates, experts, valid, num_experts), "z": choice.z(logits, valid)}
    margin = choice.order_margin(gates, priority)
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
