"""Top-k routing as loops over tokens: Mixtral (arXiv 2401.04088 section 2.1), OLMoE (2409.02060 section 2),
device-limited choice of DeepSeek-V2 (2405.04434 section 2.2.2)."""

import numpy as np

from tests.oracles import choice


def route(
    logits,
    k,
    capacity,
    valid,
    *,
    softmax="before",
    renormalise=True,
    scale=1.0,
    groups=1,
    groups_kept=1,
    priority="position",
):
    """Route one group by its logits ``[s, e]``, learned bias included."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    margin = choice.order_margin(gates, priority)
    experts, weights = np.zeros((s, k), int), np.zeros((s, k))
    for token in range(s):
        experts[token] = choice.best_in_groups(list(logits[token]), k, groups, groups_kept, best_of=1)
        if softmax == "after":
            weights[token] = choice.softmax(logits[token, experts[token]])
        else:
            weights[token] = [gates[token][expert] for expert in experts[token]]
            if renormalise:
                weights[token] /= weights[token].sum()
    wanted = np.repeat(np.asarray(valid)[:, None], k, axis=1)
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, scale * weights * keep, losses, int(np.sum(valid)), margin)
