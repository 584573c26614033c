"""Memory and time of a training step in closed form, without compiling: what the search ranks candidates by.

Letters as everywhere: tokens of a device T, groups of a device g, slots c, width m, hidden h, heads n, experts e. The
formulas count what every implementation must do; the compiled plan counts what XLA did.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from gshardx.config import Config, ModelConfig
from gshardx.errors import BadInput
from gshardx.layers.remat import REMAT
from gshardx.layers.routing import ROUTERS
from gshardx.models.attention import matrices as projections
from gshardx.models.attention import summed, widths
from gshardx.models.attention import vectors as vectors_of_attention
from gshardx.models.moe import router_matrices, router_words, training_choices, training_slots, training_stretch
from gshardx.models.options import decoder_options
from gshardx.plan import update
from gshardx.plan.network import seconds
from gshardx.plan.program import Serving, vocabulary
from gshardx.plan.report import Plan
from gshardx.plan.topology import Topology
from gshardx.sharding import MeshConfig

_FP32 = 4
_PRODUCTS_KEPT = ("none", "dots")
"""Rematerialisation that repeats no matrix product, but attention's scores."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one training step: bytes and seconds."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    """Copies in the type computed in, logits, and one unit's values and weights while it runs."""
    compute: float
    memory: float
    update: float
    """Of ``memory``, the optimizer's part: there are no products that it could go on beside."""
    interconnect: float
    tokens: int
    """Of all devices together."""

    @property
    def peak(self) -> float:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.working

    @property
    def step_seconds(self) -> float:
        return max(self.compute, self.memory - self.update) + self.update + self.interconnect

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What a device holds and does for a micro-batch."""

    tokens: int
    slots: int
    """Expert slots of one MoE layer: sum over its groups of e * c, or k choices a token where rows are sorted, or the
    tokens where experts are merged."""
    networks: int
    """Merged from experts, in one MoE layer; 0 where experts are not merged."""
    vocab: int
    dense_layers: int
    sparse_layers: int
    matrices: int
    itemsize: int
    whole: int
    """Parameters that no axis splits: norms, biases of routers and of attention's output, and routers' embeddings."""
    heads: float
    """Biases of queries, keys, values and logits, and norms over all heads: tensor splits them, and fsdp does not."""
    shared: float
    """Other parameters outside the experts, tensor split counted, whole over fsdp."""
    expert: float
    """Parameters of the experts that a device holds, tensor and expert split counted, whole over fsdp."""
    expert_biases: float
    """Of the hidden units, which fsdp does not split."""

    @property
    def over_fsdp(self) -> float:
        return self.shared + self.expert

    @property
    def not_over_fsdp(self) -> float:
        return self.whole + self.heads + self.expert_biases


def estimate(config: Config, topology: Topology) -> Estimate:
    """Predict a training step of ``config`` on ``topology``; the mesh is ``config.mesh``."""
    mesh, model, chip = config.mesh, config.model, topology.chip
    sizes = _sizes(config)
    local = sizes.not_over_fsdp + sizes.over_fsdp / (mesh.fsdp if config.train.zero_stage == 3 else 1)
    split = sizes.not_over_fsdp + sizes.over_fsdp / mesh.fsdp
    micro = config.train.accumulation_steps
    flops = micro * _flops(config, sizes) + update.flops(config)
    held = _FP32 * update.state(config, sizes.vocab, split)
    updating = 3 * _FP32 * split + 2 * held  # read parameter, gradient and state; write the first and the last
    adding = 0 if micro == 1 else 3 * _FP32 * split * micro  # read the sum and the new gradient, write the sum
    traffic = micro * _traffic(config, sizes) + adding + updating
    return Estimate(
        parameters=_FP32 * local,
        optimizer=held,
        gradients=_FP32 * (split if config.train.zero_stage >= 2 else local),
        activations=_activations(model, sizes, mesh.tensor, model.remat),
        working=_working(config, sizes, local) + (_FP32 * local if micro > 1 else 0),
        compute=flops / chip.peak_flops,
        memory=traffic / chip.hbm_bandwidth,
        update=updating / chip.hbm_bandwidth,
        interconnect=sum(_sends(config, sizes, topology, mesh)),
        tokens=config.train.batch_size * config.data.sequence_length,
    )


def _sizes(config: Config) -> _Sizes:
    model, mesh = config.model, config.mesh
    moe = model.moe
    rows = config.train.batch_size // config.train.accumulation_steps
    tokens = rows * config.data.sequence_length // mesh.batch_shards
    group = moe.group_size or config.data.sequence_length
    slots = tokens // group * moe.num_experts * training_slots(moe, group)
    if moe.capacity_factor is None and moe.dispatcher in ("auto", "ragged") and not ROUTERS[moe.router].MIXES:
        slots = tokens * training_choices(moe)
    stretch = training_stretch(moe, group)
    if stretch is not None:
        slots = tokens
    matrices = 3 if model.activation.endswith("glu") else 2
    sparse = model.moe_layers
    m, e = model.width, moe.num_experts
    attention, unsplit = (
        model.layers * sum(one.inputs * one.outputs for one in projections(model) if one.split == split)
        for split in (True, False)
    )
    ffn = matrices * m * (model.hidden * (model.layers - sparse) + moe.shared_hidden * sparse)
    vocab = vocabulary(config)
    # Beside the routed experts: GatedShared has a vector, Residual a matrix of two columns and two biases.
    joined = {"plain": 0, "gated": m, "residual": 2 * m}[moe.shared] if moe.shared_hidden else 0
    joined_biases = 2 if moe.shared_hidden and moe.shared == "residual" else 0
    experts = (matrices * m * moe.hidden / mesh.tensor + (m if moe.biases else 0)) * e * sparse
    biases = (matrices - 1) * moe.hidden * e * sparse if moe.biases else 0
    gates = sum(map(math.prod, router_matrices(model))) + joined
    vectors, options = vectors_of_attention(model), decoder_options(model)
    norms = (2 * model.layers + 1) * m * (2 if options.norm == "layer" else 1)
    return _Sizes(
        tokens=tokens,
        slots=slots,
        networks=tokens // stretch if stretch is not None else 0,
        vocab=vocab,
        dense_layers=model.layers - sparse,
        sparse_layers=sparse,
        matrices=matrices,
        itemsize=2 if model.dtype == "bfloat16" else 4,
        whole=norms + vectors.whole * model.layers + (joined_biases + router_words(model) * vocab) * sparse,
        heads=(vectors.split * model.layers + (vocab if options.logits_bias else 0)) / mesh.tensor,
        shared=(attention + ffn + update.tables(model) * m * vocab) / mesh.tensor + unsplit + gates * sparse,
        expert=experts / mesh.expert,
        expert_biases=biases / mesh.expert / mesh.tensor,
    )


def _flops(config: Config, sizes: _Sizes) -> float:
    """Matrix products of a step: forward, twice that backward, and what rematerialisation repeats of the layers."""
    model, moe, tensor = config.model, config.model.moe, config.mesh.tensor
    m, tokens = model.width, sizes.tokens
    products = sum(2 * tokens * one.inputs * one.outputs / (tensor if one.split else 1) for one in projections(model))
    scores = 2 * tokens * config.data.sequence_length * model.heads * sum(widths(model)) / tensor
    dense = 2 * sizes.matrices * tokens * m * model.hidden / tensor
    sparse = 2 * sizes.matrices * m * (sizes.slots * moe.hidden + tokens * moe.shared_hidden) / tensor
    sparse += 2 * tokens * sum(map(math.prod, router_matrices(model))) + _merging(config, sizes)
    layers = (products + scores) * model.layers + dense * sizes.dense_layers + sparse * sizes.sparse_layers
    return 3 * layers + _repeated(config, sizes, layers, scores) + 3 * 2 * tokens * m * sizes.vocab / tensor


def _merging(config: Config, sizes: _Sizes) -> float:
    """FLOPs of one MoE layer's merged networks, forward, without what they do with tokens."""
    moe, tensor = config.model.moe, config.mesh.tensor
    return 2.0 * sizes.matrices * config.model.width * moe.hidden / tensor * moe.num_experts * sizes.networks


def _repeated(config: Config, sizes: _Sizes, layers: float, scores: float) -> float:
    """FLOPs that the backward pass repeats: of each attention the scores always; with rematerialisation all of
    ``layers`` except the last product of each expert (if what comes by all-to-all is kept) and of each shared one,
    whose results no gradient needs. Networks merged from experts are always made again, and what goes into them."""
    model, moe = config.model, config.model.moe
    if model.remat in _PRODUCTS_KEPT:
        inputs = 2 * (sizes.matrices - 1) * sizes.slots * moe.hidden * model.width / config.mesh.tensor
        merged = (inputs + _merging(config, sizes)) * sizes.sparse_layers if sizes.networks else 0.0
        return scores / 2 * model.layers + merged
    rows = sizes.slots * moe.hidden if model.remat != "full" or sizes.networks else 0
    rows += sizes.tokens * moe.shared_hidden if moe.shared == "plain" else 0
    return layers - 2 * rows * model.width / config.mesh.tensor * sizes.sparse_layers


def _traffic(config: Config, sizes: _Sizes) -> float:
    """Bytes through a device's memory, without the optimizer's: weights of each pass, operands and results of the
    products."""
    model, moe, tensor = config.model, config.model.moe, config.mesh.tensor
    passes = 3 if model.remat in _PRODUCTS_KEPT else 4
    weights = sizes.over_fsdp * sizes.itemsize * passes
    # A norm reads all of them before it writes the first.
    normed = 2 * (model.heads + model.kv_heads) * model.head_dim if "qk_norm" in model.attention else 0
    per_token = 8 * model.width + 2 * _made(model, tensor) + normed / tensor
    scores = 3 * config.data.sequence_length * model.heads / tensor
    dense = 2 * model.width + 2 * sizes.matrices * model.hidden / tensor
    values = sizes.tokens * ((per_token + scores) * model.layers + dense * sizes.dense_layers)
    values += sizes.slots * (4 * model.width + 2 * sizes.matrices * moe.hidden / tensor) * sizes.sparse_layers
    logits = 6 * sizes.tokens * sizes.vocab / tensor * _FP32
    return weights + values * sizes.itemsize * passes + logits


def _made(model: ModelConfig, tensor: int) -> float:
    """Entries that a token has between attention's projections."""
    *before, last = projections(model)
    return last.inputs / tensor + sum(one.outputs / (tensor if one.split else 1) for one in before)


def _activations(model: ModelConfig, sizes: _Sizes, tensor: int, remat: str) -> float:
    """Bytes that the forward pass keeps for the backward one."""
    if remat in ("full", "offload") or (remat == "keep_all_to_all" and sizes.networks):
        kept: float = sizes.tokens * model.width * sizes.sparse_layers
    elif remat == "keep_all_to_all":
        kept = (sizes.tokens + 2 * sizes.slots) * model.width * sizes.sparse_layers
    else:
        each = sizes.tokens * (6 * model.width + _made(model, tensor))
        dense = sizes.tokens * sizes.matrices * model.hidden / tensor
        of_slot = 2 * model.width + sizes.matrices * model.moe.hidden / tensor
        sparse = sizes.slots * (model.width if sizes.networks else of_slot)
        kept = each * model.layers + dense * sizes.dense_layers + sparse * sizes.sparse_layers
    return kept * sizes.itemsize


def _working(config: Config, sizes: _Sizes, local: float) -> float:
    """Bytes alive only while they are worked on: a unit's weights and their gradient, gathered over fsdp, and the
    larger of logits and a unit's values, which rematerialisation makes all at once."""
    model, tensor = config.model, config.mesh.tensor
    copies = local * sizes.itemsize if model.dtype == "bfloat16" else 0.0
    layers = sizes.over_fsdp - update.tables(model) * model.width * sizes.vocab / tensor
    unit = 2 * layers / sizes.sparse_layers * sizes.itemsize
    logits = 2 * sizes.tokens * sizes.vocab / tensor * _FP32
    scores = sizes.tokens * config.data.sequence_length * model.heads / tensor * _FP32
    if sizes.networks:  # the experts of all devices along expert, their gradient, and the networks with theirs
        weights = sizes.expert * config.mesh.expert / sizes.sparse_layers
        unit += 2 * weights * (1 + sizes.networks / model.moe.num_experts) * sizes.itemsize
    if model.remat in _PRODUCTS_KEPT:
        layer = 2 * sizes.slots * (2 * model.width + sizes.matrices * model.moe.hidden / tensor) * sizes.itemsize
    else:
        layer = _activations(model, sizes, tensor, "none") / sizes.sparse_layers
    return copies + unit + max(logits, scores + layer)


def _sends(config: Config, sizes: _Sizes, topology: Topology, mesh: MeshConfig) -> Iterator[float]:
    """Seconds of each kind of collective of all micro-batches. Slices are joined along data first, then fsdp, then
    expert."""
    model, zero, micro = config.model, config.train.zero_stage, config.train.accumulation_steps

    def took(op: str, size: float, *axes: str, count: int = 1, times: int = micro) -> float:
        lengths = [mesh.shape[axis] for axis in axes]
        inner = math.prod(lengths) * mesh.tensor
        crosses = topology.slices > 1 and ("data" in axes or inner > mesh.size // topology.slices)
        each = seconds(op, size / count, lengths, topology.chip, topology.torus, crosses, topology.slices)
        return times * count * each

    wire = 2 if model.moe.wire == "bfloat16" else sizes.itemsize
    exchanges = (6 if model.remat == "full" else 4) * sizes.sparse_layers
    if sizes.networks:
        each, weights = sizes.matrices * sizes.sparse_layers, sizes.expert * sizes.itemsize
        yield took("all-gather", 2 * weights, "expert", count=2 * each)
        yield took("reduce-scatter", weights * mesh.expert, "expert", count=each)
    else:
        yield took("all-to-all", exchanges * sizes.slots * model.width * wire, "expert", count=exchanges)
    # One for each matrix.
    gathers = (len(projections(model)) + sizes.matrices) * model.layers + sizes.sparse_layers + 2
    split = sizes.over_fsdp / mesh.fsdp
    if zero == 3:
        yield 2 * took("all-gather", split * sizes.itemsize, "fsdp", count=gathers)
    else:
        yield took("all-gather", split * _FP32, "fsdp", count=gathers, times=1)
    # The sum over fsdp leaves each device its part (ZeRO-2, 3); what data and expert add to it is a sum of that part.
    yield took("reduce-scatter", sizes.shared * sizes.itemsize, "fsdp")
    yield took("reduce-scatter", sizes.expert * sizes.itemsize, "fsdp")
    yield took("all-reduce", sizes.shared / mesh.fsdp * sizes.itemsize, "data", "expert")
    yield took("all-reduce", sizes.expert / mesh.fsdp * sizes.itemsize, "data")
    count, rows = _partial_sums(model, sizes)
    yield took("all-reduce", rows * model.width * sizes.itemsize, "tensor", count=count)
    if (
        model.attention.get("qk_norm") == "whole"
    ):  # mean squares, forward and wherever they are made again, and backward
        norms = 2 * model.layers * (2 if model.remat in _PRODUCTS_KEPT else 3)
        yield took("all-reduce", norms * sizes.tokens * _FP32, "tensor", count=norms)
    for op, axis, number, values in update.sends(config):
        yield took(op, values * _FP32, axis, count=number)


def _partial_sums(model: ModelConfig, sizes: _Sizes) -> tuple[int, float]:
    """How many sums over tensor a step takes, and their rows together: each block's results, forward and wherever they
    are made again, and the gradients of what its products take in."""
    dense, sparse, inputs = sizes.dense_layers, sizes.sparse_layers, sizes.matrices - 1
    beside = sparse if model.moe.shared_hidden else 0
    again = 1 if model.remat in _PRODUCTS_KEPT else 2

    def total(tokens: int, slots: int, inputs_of_attention: float = 3.0) -> float:
        forward = (model.layers + dense + beside) * tokens + sparse * slots
        backward = (inputs_of_attention * model.layers + inputs * (dense + beside)) * tokens + inputs * sparse * slots
        return 2 * tokens + again * forward + backward

    return int(total(1, 1)), total(sizes.tokens, sizes.slots, summed(model) / model.width)


def advice(config: Config, topology: Topology, plan: Plan, serving: Serving) -> list[str]:
    """What would make a step fit that does not, nearest change first; estimates, so compile again with the change."""
    if plan.fits or plan.memory["peak"] is None:
        return []
    return _training_advice(config, topology, plan) if plan.step == "train" else _other_advice(config, plan, serving)


def _other_advice(config: Config, plan: Plan, serving: Serving) -> list[str]:
    """Parameters take what they take; caches and everything else follow the rows, and a cache the length too."""
    held, peak = plan.memory["parameters"] or 0, plan.memory["peak"] or 0
    if held >= plan.hbm_bytes:
        times = math.ceil(held / plan.hbm_bytes) * 2  # so that parameters take half of a device at most
        return [f"to make it fit: use about {times} times as many devices on mesh.expert, mesh.fsdp or mesh.tensor"]
    share = (plan.hbm_bytes - held) / (peak - held)
    flag, rows = ("--train.batch_size", config.train.batch_size)
    if plan.step != "forward":
        flag, rows = "--rows", serving.rows
    shards = config.mesh.batch_shards
    fewer = int(rows * share) // shards * shards
    lines = [f"to make it fit: {flag} {fewer}"] if fewer else []
    if plan.step != "forward" and int(serving.length * share):
        lines.append(f"to make it fit: --length {int(serving.length * share)}")
    return lines or ["to make it fit: use twice as many devices on mesh.expert, mesh.fsdp or mesh.tensor"]


def _training_advice(config: Config, topology: Topology, plan: Plan) -> list[str]:
    now = estimate(config, topology)
    # What the formulas miss of this model they miss of its neighbours too.
    scale = (plan.memory["peak"] or 0) / now.peak
    fitting = []
    for change, changed in neighbours(config, topology):
        peak = estimate(changed, topology).peak * scale
        if peak <= plan.hbm_bytes:
            fitting.append(f"to make it fit: {change} (about {peak / 2**30:,.1f} GiB)")
    state = (now.parameters + now.optimizer + now.gradients) * scale
    more = math.ceil(state / plan.hbm_bytes) * 2  # so that it takes half of a device at most
    return fitting or [f"to make it fit: use about {more} times as many devices; no single change here is enough"]


def neighbours(config: Config, topology: Topology) -> Iterator[tuple[str, Config]]:
    """Configs that differ in one thing that saves memory, with the flags that say so."""
    if config.train.zero_stage < 3:
        yield from _valid("--train.zero_stage 3", config, topology, train={"zero_stage": 3})
    policies = tuple(REMAT)
    for remat in policies[policies.index(config.model.remat) + 1 :]:
        yield from _valid(f"--model.remat {remat}", config, topology, model={"remat": remat})
    shares = (2, 4, 8, 16, 32)
    for axis in ("fsdp", "expert", "tensor"):
        for share in shares:
            if config.mesh.data % share == 0:
                mesh = {**config.mesh.shape, "data": config.mesh.data // share, axis: config.mesh.shape[axis] * share}
                flags = " ".join(f"--mesh.{name} {size}" for name, size in mesh.items())
                yield from _valid(flags, config, topology, mesh=mesh)
    for share in shares:
        steps = config.train.accumulation_steps * share
        yield from _valid(f"--train.accumulation_steps {steps}", config, topology, train={"accumulation_steps": steps})
    for share in shares:
        if config.train.batch_size % share == 0:
            batch = config.train.batch_size // share
            yield from _valid(f"--train.batch_size {batch}", config, topology, train={"batch_size": batch})


def _valid(
    flags: str, config: Config, topology: Topology, **changes: Mapping[str, object]
) -> Iterator[tuple[str, Config]]:
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    try:
        changed = dataclasses.replace(config, **sections)
    except BadInput:
        return
    if can_lie_on(changed, topology):
        yield flags, changed


def can_lie_on(config: Config, topology: Topology) -> bool:
    """Whether the model and its mesh can be laid out on ``topology``: what the config alone does not say.

    The vocabulary divides over ``tensor``, and ``tensor`` stays inside a slice or host (see
    :func:`gshardx.sharding.build_mesh`).
    """
    return vocabulary(config) % config.mesh.tensor == 0 and config.mesh.batch_shards % topology.slices == 0
