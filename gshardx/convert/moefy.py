"""From a dense ReLU network to experts that are parts of it: MoEfication (arXiv 2110.01786).

A hidden unit whose ReLU is 0 adds nothing. Units that are active on the same tokens are put into one expert, and a
token computes the experts that hold most of what is active. A dense network is the sum of its experts, so each that is
chosen weighs 1, and all of them together are the dense network.

    experts    its parameter clustering split: k-means over the units' input weights, with clusters of equal size; or
               over their activations on some text, a stand-in for its co-activation graph split
    router     its expert selection trains a small network to predict each expert's sum of activations; here a linear
               one, fitted by ridge regression, since routers here are linear
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gshardx.config import ModelConfig
from gshardx.config.checks import divisor
from gshardx.convert.rewrite import EXPERTS, ROUTER, Given, Part
from gshardx.convert.upcycle import check_dense
from gshardx.errors import BadInput

ROUNDS = 30
"""Of k-means, at most."""
RIDGE = 1e-3
"""Of the router's regression, times the inputs' mean variance."""
DIRECTIONS = 256
"""That activations on text are projected to before they are clustered."""
_TOKENS = 512  # whose hidden units are in memory at once


class Moefying(NamedTuple):
    """What to make of a dense model.

    Attributes:
        experts: of each layer that has one now.
        top_k: that a token chooses.
        by: what hidden units are clustered by.
        seed: of the clusters.
    """

    experts: int
    top_k: int
    by: Literal["weights", "activations"] = "weights"
    seed: int = 0


class Network(NamedTuple):
    """A dense layer, fp32."""

    w_up: Float[np.ndarray, "m h"]
    b_up: Float[np.ndarray, "h"] | None
    w_down: Float[np.ndarray, "h m"]

    def hidden(self, x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n h"]:
        """The units, after ReLU."""
        pre = x @ self.w_up
        return np.maximum(pre if self.b_up is None else pre + self.b_up, 0.0)


class Split(NamedTuple):
    """units: of each expert, ascending. kernel, bias: of the router; its logits predict experts' sums of
    activations."""

    units: Int[np.ndarray, "e s"]
    kernel: Float[np.ndarray, "m e"]
    bias: Float[np.ndarray, "e"]


def moefied(model: ModelConfig, how: Moefying) -> ModelConfig:
    """The config of the new model.

    Raises:
        BadInput: the model isn't dense, has another activation, or can't be divided so.
    """
    moe = model.moe
    check_dense(model)
    if model.activation != "relu":
        raise BadInput(
            f"model.activation = {model.activation}: its hidden units are hardly ever 0, so no expert could be left "
            "out; MoEfication is for relu (upcycling takes any)"
        )
    if moe.hidden % how.experts:
        fits = divisor(moe.hidden, how.experts)
        raise BadInput(f"--experts {how.experts}: does not divide model.moe.hidden = {moe.hidden}; use {fits}")
    new = dataclasses.replace(
        moe,
        num_experts=how.experts,
        top_k=how.top_k,
        hidden=moe.hidden // how.experts,
        router="top_k",
        router_options={"softmax": "none", "bias": True},
        losses={},  # they alone would move the router, away from what it was fitted to
        adaptive_balance=False,
    )
    return dataclasses.replace(model, moe=new)


def network_of(given: Given, layer: int) -> Network:
    """Of a layer with one expert."""
    names = {name.rpartition(".")[2] for name in given.dtypes if f".{EXPERTS}" in name}
    arrays = {
        name: given.in_layer(layer, EXPERTS + name, 0).astype(np.float32) for name in names & {"w_up", "b_up", "w_down"}
    }
    return Network(arrays["w_up"], arrays.get("b_up"), arrays["w_down"])


def split_network(network: Network, x: Float[np.ndarray, "n m"], how: Moefying, layer: int) -> Split:
    """Clusters of units, and a router that is fitted to the layer's inputs ``x``."""
    draw = np.random.default_rng([how.seed, layer])
    vectors = network.w_up.T if how.by == "weights" else _activations(network, x, draw)
    units = balanced_clusters(vectors, how.experts, draw)
    return Split(units, *fitted_router(x, masses(network, units, x)))


def random_split(network: Network, x: Float[np.ndarray, "n m"], how: Moefying, layer: int) -> Split:
    """Units dealt out at random, and a router fitted to that: what a split is to be better than."""
    draw = np.random.default_rng([how.seed, layer, 1])
    units = np.sort(draw.permutation(network.w_up.shape[1]).reshape(how.experts, -1), axis=1)
    return Split(units, *fitted_router(x, masses(network, units, x)))


def _activations(network: Network, x: Float[np.ndarray, "n m"], draw: np.random.Generator) -> Float[np.ndarray, "h d"]:
    """What each unit is on the text, of length 1, in random directions, which keep distances about as they are."""
    found = np.zeros((network.w_up.shape[1], DIRECTIONS), np.float32)
    for first in range(0, len(x), _TOKENS):
        hidden = network.hidden(x[first : first + _TOKENS])
        found += hidden.T @ draw.standard_normal((len(hidden), DIRECTIONS), np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-20)


def masses(network: Network, units: Int[np.ndarray, "e s"], x: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n e"]:
    """Each expert's sum of activations."""
    parts = [network.hidden(x[first : first + _TOKENS]) for first in range(0, len(x), _TOKENS)]
    return np.concatenate([part[:, units].sum(-1) for part in parts])


def fitted_router(
    x: Float[np.ndarray, "n m"], mass: Float[np.ndarray, "n e"]
) -> tuple[Float[np.ndarray, "m e"], Float[np.ndarray, "e"]]:
    """Kernel and bias whose logits are the least squares estimate of ``mass``, with a small penalty on the kernel."""
    middle, mean = x.mean(0, dtype=np.float64), mass.mean(0, dtype=np.float64)
    around = x - middle
    square = around.T @ around
    square += max(RIDGE * float(np.trace(square)) / len(square), 1e-30) * np.eye(len(square))
    kernel = np.linalg.solve(square, around.T @ (mass - mean))
    return kernel.astype(np.float32), (mean - middle @ kernel).astype(np.float32)


def balanced_clusters(
    vectors: Float[np.ndarray, "h d"], count: int, draw: np.random.Generator
) -> Int[np.ndarray, "e s"]:
    """k-means with clusters of h / ``count`` each; members ascending.

    Each vector wants its nearest centre; of those that want a full one, the ones that would lose most elsewhere stay.
    (The paper's solves each assignment exactly, in time that grows with the cube of h.)
    """
    vectors = vectors.astype(np.float32) - vectors.mean(0, dtype=np.float32)
    centres = vectors[_spread(vectors, count, draw)]
    best, least = np.zeros(0, np.int64), np.inf
    for _ in range(ROUNDS):
        distances = (centres**2).sum(1) - 2 * vectors @ centres.T  # but for each vector's own square
        labels = assigned(distances)
        loss = float(distances[np.arange(len(labels)), labels].sum(dtype=np.float64))
        if loss >= least:
            break
        best, least = labels, loss
        centres = np.stack([vectors[labels == cluster].mean(0) for cluster in range(count)])
    return np.stack([np.flatnonzero(best == cluster) for cluster in range(count)])


def _spread(vectors: Float[np.ndarray, "h d"], count: int, draw: np.random.Generator) -> list[int]:
    """First centres, far from each other (k-means++)."""
    chosen = [int(draw.integers(len(vectors)))]
    away = np.full(len(vectors), np.inf)
    while len(chosen) < count:
        away = np.minimum(away, ((vectors - vectors[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        away[chosen] = 0.0
        weights = away if away.sum() > 0 else np.isin(np.arange(len(away)), chosen, invert=True).astype(np.float64)
        chosen.append(int(draw.choice(len(vectors), p=weights / weights.sum())))
    return chosen


def assigned(distances: Float[np.ndarray, "h e"]) -> Int[np.ndarray, "h"]:
    """A cluster for each, h / e to each cluster."""
    h, e = distances.shape
    labels, free = np.full(h, -1), np.ones(e, bool)
    while True:
        left = np.flatnonzero(labels < 0)
        open_to = np.where(free, distances[left], np.inf)
        nearest = open_to.argmin(1)
        two = np.partition(open_to, 1, axis=1)
        loses = two[:, 1] - two[:, 0]
        crowded = np.flatnonzero(np.bincount(nearest, minlength=e) > h // e)
        if not len(crowded):
            labels[left] = nearest
            return labels
        for cluster in crowded:
            wants = np.flatnonzero(nearest == cluster)
            stay = wants[np.argsort(-loses[wants], kind="stable")[: h // e]]
            labels[left[stay]], free[cluster] = cluster, False


def moefied_part(given: Given, how: Moefying, splits: dict[int, Split], part: Part) -> np.ndarray:
    """What the new model has, from the dense one; ``splits``: by layer."""
    if part.layer is None:
        return given.outside(part)
    name = part.rest.rpartition(".")[2]
    if part.rest.startswith(ROUTER):
        split = splits[part.layer]
        return split.kernel if name == "kernel" else split.bias
    if part.expert is None:
        return given.in_layer(part.layer, part.rest)
    old, units = given.in_layer(part.layer, part.rest, 0), splits[part.layer].units[part.expert]
    if name == "b_down":
        return (old.astype(np.float32) / how.top_k).astype(old.dtype)  # as many experts add it
    return old[units] if name == "w_down" else old[..., units]
