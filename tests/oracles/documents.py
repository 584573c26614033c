"""Routing by documents (arXiv 2110.03742, 2108.05036) as loops: the mean so far, and the tag so far."""

import numpy as np

from tests.oracles import choice, top_k


def means(notes, valid):
    """Of each token's notes ``[s, n]`` and those of the real tokens before it."""
    found = np.zeros(notes.shape)
    for token in range(len(notes)):
        before = [notes[t].astype(float) for t in range(token + 1) if valid[t]]
        found[token] = sum(before) / len(before) if before else 0.0
    return found


def seen(ids, tags, valid):
    """Number of the first of ``tags`` that a token or an earlier one is; as many as there are: none."""
    found = []
    for token in range(len(ids)):
        had = {int(ids[t]) for t in range(token + 1) if valid[t]}
        found.append(next((number for number, tag in enumerate(tags) if tag in had), len(tags)))
    return found


def sentence(notes, k, capacity, valid, **options):
    return top_k.route(means(notes, valid), k, capacity, valid, **options)


def task(ids, tags, table, k, capacity, valid, **options):
    return top_k.route(np.asarray([table[row] for row in seen(ids, tags, valid)]), k, capacity, valid, **options)


def demix(ids, tags, capacity, valid):
    s, e = len(ids), len(tags)
    experts, gates = np.zeros((s, 1), int), np.zeros((s, e))
    for token, tag in enumerate(seen(ids, tags, valid)):
        experts[token, 0] = 0 if tag == e else tag
        gates[token, experts[token, 0]] = 1.0
    wanted = np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, range(s))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid) if np.any(valid) else 0.0, "z": choice.z(gates, valid)}
    return choice.Routed(experts, wanted, slots, keep, 1.0 * keep, losses, int(np.sum(valid)), np.inf)
