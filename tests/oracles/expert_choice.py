"""Expert choice (arXiv 2202.09368, section 3) as loops in float64."""

import math

import numpy as np

from tests.oracles import choice


def route(logits, k, capacity, valid, most=None):
    """Route one group by its logits ``[s, e]``: every token has a choice of every expert, wanted where it was taken."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    real = [token for token in range(s) if valid[token]]
    wishes = np.asarray(gates) if most is None else plan(np.asarray(gates), real, capacity, most)
    wanted, slots, margin = np.zeros((s, e), bool), np.zeros((s, e), int), math.inf
    for expert in range(e):
        ordered = sorted(real, key=lambda token: (-wishes[token, expert], token))
        taken = sorted(ordered[:capacity])
        for slot, token in enumerate(taken):
            wanted[token, expert], slots[token, expert] = True, slot
        if len(ordered) > capacity:
            last, next_one = (wishes[token, expert] for token in ordered[capacity - 1 : capacity + 1])
            margin = min(margin, last - next_one) if last != next_one else margin
    weights = np.where(wanted, np.asarray(gates), 0.0)
    experts = np.tile(np.arange(e), (s, 1))
    losses = {"balance": choice.balance(gates, experts, valid) if real else 0.0, "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, wanted, weights, losses, len(real), margin)


def plan(gates, real, capacity, most, smoothness=0.001, iterations=100):
    """A of section 3.3 by Dykstra's projections, each row and column in turn, as log A, with what was
    cut off above 1 given back; padding has no entry."""
    s, e = gates.shape
    entries = np.full((s, e), -np.inf)
    for token in real:
        entries[token] = gates[token] / smoothness
    rows, ones = np.zeros(s), np.zeros((s, e))
    for _ in range(iterations):
        for expert in range(e):
            if real:
                entries[real, expert] += math.log(min(capacity, len(real))) - log_sum(entries[real, expert])
        for token in real:
            wide = entries[token] + rows[token]
            lowered = min(0.0, math.log(most) - log_sum(wide))
            entries[token], rows[token] = wide + lowered, -lowered
        for token in real:
            for expert in range(e):
                wide = entries[token, expert] + ones[token, expert]
                entries[token, expert] = min(wide, 0.0)
                ones[token, expert] = wide - entries[token, expert]
    return entries + ones


def log_sum(values):
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
