"""Hash layers (arXiv 2106.04426) as loops over tokens, with integers of any size cut to 32 bits."""

import math

import numpy as np

from tests.oracles import choice

WORD = 2**32


def hashed(token, seed):
    """The finalizer of MurmurHash3, 32 bits."""
    bits = (token + seed * 0x9E3779B9) % WORD
    bits = (bits ^ (bits // 2**16)) * 0x85EBCA6B % WORD
    bits = (bits ^ (bits // 2**13)) * 0xC2B2AE35 % WORD
    return bits ^ (bits // 2**16)


def balanced(counts, num_experts):
    """Most frequent first, each to the emptiest expert."""
    table, total = {}, [0] * num_experts
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        table[token] = choice.best([-load for load in total], 1)[0]
        total[table[token]] += counts[token]
    return table


def route(ids, num_experts, k, capacity, valid, seed=0, counts=None):
    """Route one group by its ids ``[s]``."""
    s, size = len(ids), num_experts // k
    table = {} if counts is None else balanced(counts, num_experts)
    experts, gates = np.zeros((s, k), int), np.zeros((s, num_experts))
    for token in range(s):
        for rank in range(k):
            experts[token, rank] = rank * size + hashed(int(ids[token]), seed + rank) % size
        if int(ids[token]) in table:
            experts[token, 0] = table[int(ids[token])]
        gates[token, experts[token]] = 1 / k
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, _ = choice.number(experts, wanted, num_experts, range(s))
    keep = wanted & (slots < capacity)
    balance = choice.balance(gates, experts, valid) if np.any(valid) else 0.0
    losses = {"balance": balance, "z": choice.z(gates, valid)}
    return choice.Routed(experts, wanted, slots, keep, 1.0 * keep, losses, int(np.sum(valid)), math.inf)
