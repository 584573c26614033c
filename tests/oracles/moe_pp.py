"""MoE++ (arXiv 2410.07348) as loops over tokens and experts: zero, copy and constant experts after the others."""

import math

import numpy as np

from tests.oracles import choice


def slots(s, e, k, factor, z, tau):
    """factor tau k s / (tau e + z), rounded up, at most s."""
    return s if factor is None else min(s, max(1, math.ceil(factor * tau * k * s / (tau * e + z) - 1e-9)))


def balance(gates, experts, real, e, tau):
    """sum_i eta_i f_i P_i, over what it is where f_i = P_i = (1 / eta_i) / sum of those."""
    tokens, eta = [t for t in range(len(gates)) if real[t]], [1.0 if i < e else tau for i in range(len(gates[0]))]
    total = 0.0
    for i in range(len(eta)):
        share = sum(list(experts[t]).count(i) for t in tokens) / max(len(tokens) * experts.shape[1], 1)
        total += eta[i] * share * sum(gates[t][i] for t in tokens) / max(len(tokens), 1)
    return total * sum(1 / x for x in eta)


def route(logits, k, capacity, valid, *, kinds, tau=0.75, renormalise=False, priority="position"):
    """Route one group by its logits ``[s, e + z]``; also the weights ``[s, z]`` of what is computed on the spot."""
    s, z = len(logits), sum(kinds)
    e = logits.shape[1] - z
    gates = [choice.softmax(row) for row in logits]
    experts, weights, local = np.zeros((s, k), int), np.zeros((s, k)), np.zeros((s, z))
    for token in range(s):
        experts[token] = choice.best(list(logits[token]), k)
        for rank, expert in enumerate(experts[token]):
            zero = e <= expert < e + kinds[0]
            weights[token, rank] = 0 if renormalise and zero else gates[token][expert]
        if renormalise and weights[token].sum() > 0:
            weights[token] /= weights[token].sum()
        for rank, expert in enumerate(experts[token]):
            if expert >= e and valid[token]:
                local[token, expert - e] = weights[token, rank]
    wanted = (experts < e) & np.asarray(valid)[:, None]
    places, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (places < capacity)
    losses = {"balance": balance(gates, experts, valid, e, tau), "z": choice.z(logits, valid)}
    margin = choice.order_margin(gates, priority)
    return choice.Routed(experts, wanted, places, keep, weights * keep, losses, int(np.sum(valid)), margin), local


def computed(x, local, kinds, shares, values):
    """What one token's experts on the spot make of it: ``shares`` [m, 2 j] and ``values`` [j, m] are the constants'."""
    out, (zero, copy, constant) = np.zeros(len(x)), kinds
    for number in range(copy):
        out += local[zero + number] * x
    for j in range(constant):
        one, other = choice.softmax(x @ shares[:, 2 * j : 2 * j + 2])
        out += local[zero + copy + j] * (one * x + other * values[j])
    return out
