"""SMoE-Dropout (arXiv 2303.01610) as loops over tokens in float64."""

from fractions import Fraction

import numpy as np

from tests.oracles import choice


def number_of_experts(step, fewest, most, steps):
    """k(t), linear and rounded."""
    return round(Fraction(most - fewest) * min(step, steps) / steps) + fewest


def route(logits, now, width, capacity, valid, *, priority="position"):
    """Route one group by its logits ``[s, e]`` to ``now`` experts a token, of ``width`` choices."""
    s, e = logits.shape
    experts, weights, made = np.zeros((s, width), int), np.zeros((s, width)), np.zeros((s, width), bool)
    for token in range(s):
        experts[token] = choice.best(list(logits[token]), width)
        made[token, :now] = True
        weights[token, :now] = choice.softmax(logits[token, experts[token, :now]])
    gates = [choice.softmax(row) for row in logits]
    wanted = made & np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid, made), "z": choice.z(logits, valid)}
    margin = choice.order_margin(gates, priority)
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
