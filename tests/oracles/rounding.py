"""Top-k routing with token rounding (SonicMoE, arXiv 2512.14080) as loops over experts and tokens."""

from fractions import Fraction

import numpy as np

from tests.oracles import choice


def taken(chosen, could, gates, tile):
    """Who goes to one expert: a list of tokens, from lists of those that chose it and of those that may go there."""
    count = round(Fraction(len(chosen), tile)) * tile  # Python rounds halves to even
    if count > len(could):
        count -= tile
    by_gate = sorted(chosen, key=lambda t: (-gates[t], t))
    others = sorted(set(could) - set(chosen), key=lambda t: (-gates[t], t))
    return (by_gate + others)[:count]


def route(logits, k, capacity, valid, tile, *, softmax="before", renormalise=True, scale=1.0, groups=1, groups_kept=1):
    """Route one group by its logits ``[s, e]``; choices are all experts of a token, best first."""
    s, e = logits.shape
    real = [t for t in range(s) if valid[t]]
    gates = np.array([choice.softmax(row) for row in logits])
    size = e // groups
    experts, plain, could = np.zeros((s, e), int), np.zeros((s, k), int), [[] for _ in range(e)]
    for t in range(s):
        best_parts = choice.best(choice.group_scores(list(logits[t]), groups, 1), groups_kept)
        closed = [i for i in range(e) if i // size not in best_parts]
        opened = choice.best([-np.inf if i in closed else x for i, x in enumerate(logits[t])], e - len(closed))
        experts[t], plain[t] = opened + closed, opened[:k]
        for expert in opened:
            could[expert] += [t] if valid[t] else []
    wanted = np.zeros((s, e), bool)
    for expert in range(e):
        chosen = [t for t in real if expert in plain[t]]
        for t in taken(chosen, could[expert], gates[:, expert], tile):
            wanted[t, list(experts[t]).index(expert)] = True
    weights = np.zeros((s, e))
    for t in range(s):
        of_all = {"before": 1.0, "after": gates[t, plain[t]].sum(), "none": None}[softmax]
        if softmax == "before" and renormalise:
            of_all = gates[t, plain[t]].sum()
        weights[t] = 1.0 if of_all is None else gates[t, experts[t]] / of_all
    slots, _ = choice.number(experts, wanted, e, range(s))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, plain, valid), "z": choice.z(logits, valid)}
    margin = min(choice.gap(gates[:, expert]) for expert in range(e))
    return choice.Routed(experts, wanted, slots, keep, scale * weights * keep, losses, len(real), margin)
