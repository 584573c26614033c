"""The cosine router's logits (X-MoE, arXiv 2204.09179; Tutel's temperature), a token and an expert at a time."""

import math


def direction(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length if length else 0.0 for x in vector]


def logits(tokens, projection, columns, log_temperature):
    """Of tokens ``[s, m]`` with ``[m, d]`` and ``[d, e]``, lists of lists of floats."""
    temperature = min(math.exp(log_temperature), 100.0)
    experts = [direction(column) for column in zip(*columns, strict=True)]
    rows = []
    for token in tokens:
        projected = direction(
            [sum(x * row[i] for x, row in zip(token, projection, strict=True)) for i in range(len(projection[0]))]
        )
        rows.append([temperature * sum(a * b for a, b in zip(projected, one, strict=True)) for one in experts])
    return rows
