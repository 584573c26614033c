"""What an optimizer holds, computes and sends, in closed form: per kind of matrix, as docs/optimizers.md says it."""

import dataclasses
from collections.abc import Iterator

from gshardx.config import Config, ModelConfig
from gshardx.models.attention import matrices as projections
from gshardx.models.moe import router_matrices

_ITERATIONS = 5  # of Newton-Schulz


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Parameters of one kind: matrices of a width, mostly the model's, which ``fsdp`` splits, by another side."""

    times: int
    """How many such parameters there are."""
    layers: int
    """Matrices of one, along its layers."""
    experts: int
    """And along the experts of a device."""
    width: int
    other: int
    split: int
    """Devices along ``tensor``, if that splits the other side."""
    hidden: bool = True
    """Inside the network: what Muon makes orthogonal."""

    @property
    def matrices(self) -> int:
        return self.times * self.layers * self.experts

    def held(self, fsdp: int) -> float:
        """Values on a device."""
        return self.matrices * self.width / fsdp * self.other / self.split


def _stacks(config: Config) -> list[_Stack]:
    model, moe, mesh = config.model, config.model.moe, config.mesh
    units, kinds = model.moe_layers, 3 if model.activation.endswith("glu") else 2

    def stack(times: int, other: int, experts: int = 1) -> _Stack:
        return _Stack(times, units, experts, model.width, other, mesh.tensor)

    def flat(times: int, layers: int, other: int, split: int = 1) -> _Stack:
        return _Stack(times, layers, 1, model.width, other, split, hidden=False)

    def once(times: int, other: int) -> _Stack:
        return _Stack(times, 1, 1, model.width, other, mesh.tensor)

    *before, last = projections(model)
    sides = [(one.inputs, one.outputs, one.split) for one in before] + [(last.outputs, last.inputs, last.split)]
    beside, first = bool(moe.shared_hidden), moe.dense_first
    return [
        *(_Stack(first, 1, 1, width, other, mesh.tensor if split else 1) for width, other, split in sides),
        once(kinds * first, model.hidden),
        *(_Stack(moe.every, units, 1, width, other, mesh.tensor if split else 1) for width, other, split in sides),
        stack(kinds * (moe.every - 1), model.hidden),
        stack(kinds, moe.hidden, moe.num_experts // mesh.expert),
        stack(kinds * beside, moe.shared_hidden),
        *(_Stack(1, units, 1, width, other, 1, hidden=False) for width, other in router_matrices(model)),
        flat(int(beside and moe.shared == "residual"), units, 2),
    ]


def tables(model: ModelConfig) -> int:
    """Matrices of width by vocabulary: the embedding's, and the logits' where they are not tied."""
    return 1 if model.tie_embeddings else 2


def state(config: Config, vocab: int, split: float) -> float:
    """Values that the optimizer keeps on a device, the average of the weights included.

    Args:
        config: the run.
        vocab: tokens of the vocabulary, a side of embedding and logits.
        split: parameters on a device, where the optimizer has them.
    """
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    stacks = _stacks(config)
    table = _Stack(tables(config.model), 1, 1, config.model.width, vocab, tensor, hidden=False)
    average = split if config.optimizer.ema_decay is not None else 0.0
    if config.optimizer.name == "adafactor":
        matrices = [*stacks, table]
        factors = sum(one.matrices * (one.width / fsdp + one.other / one.split) for one in matrices)
        vectors = split - sum(one.held(fsdp) for one in matrices)
        return average + factors + vectors + (split if config.optimizer.beta1 else 0.0)
    once = {
        "adamw": 0.0,
        "lion": split,
        "muon": sum(one.held(fsdp) for one in stacks if one.hidden),
    }[config.optimizer.name]
    return average + 2 * split - once


def flops(config: Config) -> float:
    """Of a device's products in the update: Muon's, 4 a^2 b + 2 a^3 an iteration for a matrix of a by b, a <= b."""
    if config.optimizer.name != "muon":
        return 0.0
    total = 0.0
    for one in (one for one in _stacks(config) if one.hidden):
        small, large = sorted((one.width, one.other))
        *_, (layers, experts, _) = _ways(config, one)
        total += one.times * layers * experts * _ITERATIONS * (4 * small**2 * large + 2 * small**3)
    return total


def sends(config: Config) -> Iterator[tuple[str, str, int, float]]:
    """Collectives of the update: op, mesh axis, count and values that a device puts in, all together. Muon's matrices,
    as :func:`gshardx.train.optimizers.muon.muon` says."""
    if config.optimizer.name != "muon":
        return
    for one in (one for one in _stacks(config) if one.hidden and one.times):
        values = one.held(config.mesh.fsdp)
        for (axis, size), (_, _, divides) in zip(_axes(config), list(_ways(config, one))[1:], strict=True):
            if divides:
                yield "all-to-all", axis, 2 * one.times, 2 * values
            elif size > 1:
                yield "all-gather", axis, one.times, values
                values *= size


def _axes(config: Config) -> list[tuple[str, int]]:
    return [("fsdp", config.mesh.fsdp), ("tensor", config.mesh.tensor)]


def _ways(config: Config, one: _Stack) -> Iterator[tuple[int, int, bool]]:
    """Layers and experts that a device works on once each axis has left the matrices, and whether it went to them."""
    layers, experts = one.layers, one.experts
    yield layers, experts, False
    for _, size in _axes(config):
        divides = size > 1 and (layers % size == 0 or experts % size == 0)
        if divides and layers % size == 0:
            layers //= size
        elif divides:
            experts //= size
        yield layers, experts, divides
