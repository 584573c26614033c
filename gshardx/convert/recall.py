"""How much of a dense layer the experts hold that a token chooses, for every number of choices."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from gshardx.convert.moefy import Network, Split

_VALUES = 1 << 24  # of experts' outputs, in memory at once
_ALL = 16  # experts, up to which a table has a row for each number of choices


class Recall(NamedTuple):
    """For k = 1 ... e choices.

    Attributes:
        mass: share of the sum of all positive activations that the chosen experts' are, over all tokens.
        output: 1 less the norm of what the chosen experts' outputs lack of the layer's, relative to the layer's, over
            all tokens. Below 0 where nothing would be nearer.
    """

    mass: Float[np.ndarray, "e"]
    output: Float[np.ndarray, "e"]


class LayerRecall(NamedTuple):
    """clusters, random: how units were split. routed, best: the router chooses, or the experts with the largest sums of
    activations are taken (the paper's groundtruth selection)."""

    clusters_routed: Recall
    clusters_best: Recall
    random_routed: Recall
    random_best: Recall

    def numbers(self) -> dict[str, dict[str, list[float]]]:
        """As JSON has them."""
        return {
            name: {what: values.tolist() for what, values in one._asdict().items()}
            for name, one in self._asdict().items()
        }


def layer_recall(network: Network, clusters: Split, random: Split, x: Float[np.ndarray, "n m"]) -> LayerRecall:
    """Of a layer on inputs that its routers were not fitted to."""
    return LayerRecall(*(one for split in (clusters, random) for one in recalls(network, split, x)))


def recalls(network: Network, split: Split, x: Float[np.ndarray, "n m"]) -> tuple[Recall, Recall]:
    """With the router's choices, and with the best."""
    e, m = len(split.units), x.shape[1]
    mass, missing = np.zeros((2, e)), np.zeros((2, e))
    whole_mass = whole = 0.0
    step = max(1, _VALUES // (e * m))
    for first in range(0, len(x), step):
        tokens = x[first : first + step]
        hidden = network.hidden(tokens)
        sums = np.stack([hidden[:, units].sum(1) for units in split.units], 1)
        outputs = np.stack([hidden[:, units] @ network.w_down[units] for units in split.units], 1)
        whole_mass += float(sums.sum(dtype=np.float64))
        whole += float((outputs.sum(1, dtype=np.float64) ** 2).sum())
        for number, scores in enumerate((tokens @ split.kernel + split.bias, sums)):
            order = np.argsort(-scores, axis=1, kind="stable")
            mass[number] += np.take_along_axis(sums, order, 1).sum(0, dtype=np.float64).cumsum()
            missing[number] += _missing(outputs, order)
    held, lacks = mass / max(whole_mass, 1e-30), np.sqrt(missing / max(whole, 1e-30))
    return Recall(held[0], 1 - lacks[0]), Recall(held[1], 1 - lacks[1])


def _missing(outputs: Float[np.ndarray, "n e m"], order: Int[np.ndarray, "n e"]) -> Float[np.ndarray, "e"]:
    """Of the outputs of the experts behind the first k in ``order``, the squared norm."""
    rest = np.zeros_like(outputs[:, 0], np.float64)
    found = np.zeros(order.shape[1])
    for k in range(order.shape[1] - 1, 0, -1):
        rest += np.take_along_axis(outputs, order[:, k, None, None], 1)[:, 0]
        found[k - 1] = (rest**2).sum()
    return found


def recall_table(layer: int, found: LayerRecall, top_k: int) -> Table:
    """Rows of k; of many experts, those that are powers of 2, and ``top_k``."""
    kinds = [name.replace("_", ", ") for name in LayerRecall._fields]
    heads = [f"{what}\n{kind}" for what in Recall._fields for kind in kinds]
    table = Table("k", *heads, title=f"layer {layer}: share held by k experts", title_justify="left")
    for k in _rows(len(found.clusters_best.mass), top_k):
        values = [getattr(one, what)[k - 1] for what in Recall._fields for one in found]
        table.add_row(f"{k} *" if k == top_k else str(k), *(f"{value:.1%}" for value in values))
    return table


def _rows(experts: int, top_k: int) -> Iterator[int]:
    for k in range(1, experts + 1):
        if experts <= _ALL or k & (k - 1) == 0 or k in (top_k, experts):
            yield k
