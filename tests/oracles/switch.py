"""Switch routing (arXiv 2101.03961, section 2.1 and equations 1-6) as loops over tokens."""

import numpy as np

from tests.oracles import choice


def route(logits, capacity, valid, *, priority="position"):
    """Route one group by its logits ``[s, e]``, those of the jittered tokens in training."""
    s, e = logits.shape
    gates = [choice.softmax(row) for row in logits]
    margin = choice.order_margin(gates, priority)
    experts, weights = np.zeros((s, 1), int), np.zeros((s, 1))
    for token in range(s):
        (winner,) = choice.best(list(logits[token]), 1)
        experts[token], weights[token] = winner, gates[token][winner]
        margin = min(margin, choice.gap(float(x) for x in logits[token]))
    wanted = np.asarray(valid)[:, None]
    slots, _ = choice.number(experts, wanted, e, choice.token_order(gates, priority))
    keep = wanted & (slots < capacity)
    losses = {"balance": choice.balance(gates, experts, valid), "z": choice.z(logits, valid)}
    return choice.Routed(experts, wanted, slots, keep, weights * keep, losses, int(np.sum(valid)), margin)
