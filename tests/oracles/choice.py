"""What the papers' gates have in common, as loops over tokens in float64."""

import itertools
import math
from collections import namedtuple
from fractions import Fraction

import numpy as np

Routed = namedtuple("Routed", "experts wanted slots keep weights losses tokens margin")
Routed.__doc__ = """One group: ``[s, k]`` arrays, losses, the real tokens that they are means over, and the margin.

The margin is the smallest difference that a decision hung on, where two sides may round differently; ties are none.
"""


def softmax(row):
    powers = [math.exp(float(x) - float(max(row))) for x in row]
    return [power / sum(powers) for power in powers]


def best(scores, k):
    """The k largest, best first; of equals the first."""
    left, chosen = list(range(len(scores))), []
    for _ in range(k):
        winner = max(left, key=lambda expert: (scores[expert], -expert))
        chosen.append(winner)
        left.remove(winner)
    return chosen


def group_scores(scores, groups, best_of):
    size = len(scores) // groups
    return [sum(sorted(scores[i * size : (i + 1) * size])[-best_of:]) for i in range(groups)]


def best_in_groups(scores, k, groups, groups_kept, best_of):
    """The k largest inside the ``groups_kept`` groups with the best sums of their ``best_of`` best."""
    size = len(scores) // groups
    kept = best(group_scores(scores, groups, best_of), groups_kept)
    return best([score if i // size in kept else -math.inf for i, score in enumerate(scores)], k)


def slots_per_expert(tokens, num_experts, k, factor, rounding="up", minimum=1):
    """C = factor * k * S / E; a token needs no second slot of an expert, so S is enough for all."""
    if factor is None:
        return tokens
    share = Fraction(str(factor)) * k * tokens / num_experts
    whole = math.ceil(share) if rounding == "up" else math.floor(share)
    while rounding == "four" and whole % 4:
        whole += 1
    return min(max(whole, minimum), tokens)


def token_order(gates, priority):
    """Tokens as they take slots: in order, or by their best gate, largest first (V-MoE's batch priority)."""
    tokens = range(len(gates))
    return list(tokens) if priority == "position" else sorted(tokens, key=lambda token: (-max(gates[token]), token))


def number(experts, wanted, num_experts, order):
    """Algorithm 1's counters: every first choice of the group, then every second one, ..."""
    count = [0] * num_experts
    slots = np.zeros(experts.shape, int)
    for rank in range(experts.shape[1]):
        for token in order:
            if wanted[token, rank]:
                slots[token, rank] = count[experts[token, rank]]
                count[experts[token, rank]] += 1
    return slots, count


def balance(gates, experts, real, made=None):
    """E * sum_e f_e P_e, f_e the share of ``experts`` ``[s, k]`` that are e, P_e the mean gate.

    ``made``: which of them are choices, where a token may make fewer; each token counts once.
    """
    e, tokens = len(gates[0]), [token for token in range(len(gates)) if real[token]]
    share, mean = [0.0] * e, [0.0] * e
    for token in tokens:
        chosen = experts[token] if made is None else experts[token][made[token]]
        for expert in chosen:
            share[expert] += 1 / (len(tokens) * len(chosen))
        for expert in range(e):
            mean[expert] += gates[token][expert] / len(tokens)
    return e * sum(f * p for f, p in zip(share, mean, strict=True))


def z(logits, real):
    squares = [
        math.log(sum(math.exp(float(x)) for x in row)) ** 2 for row, here in zip(logits, real, strict=True) if here
    ]
    return sum(squares) / max(len(squares), 1)


def gap(values):
    """The smallest difference between two that are not equal."""
    ordered = sorted(values)
    return min((b - a for a, b in itertools.pairwise(ordered) if a != b), default=math.inf)


def order_margin(gates, priority):
    return math.inf if priority == "position" else gap([max(row) for row in gates])
