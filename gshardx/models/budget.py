"""What one step of the decoder may send on a mesh, from formulas; :meth:`Budget.breaches` holds a compiled step to it.

Let b be the rows of one device (of all rows, its share over data, fsdp and expert), t the tokens of a row in this call,
s those of a group, g = b t / s the device's groups, w the bytes of a value in ``model.dtype`` (``moe.wire`` inside
exchanges), and *sum* over parameters. Each operation's bytes are those that one device puts in, in one step.

- **Exchanges**, only over ``expert``, in each MoE layer 2 in a forward pass and 4 in a training step (6 where
  ``remat: full`` repeats the forward pass), each of exactly ``g e c m w`` bytes, c the slots of an expert. Sorted rows
  (:class:`Ragged`) travel with room for the worst case and one exchange of counts, see :func:`_exchanges`.
- **Experts that are merged** (:class:`Blending`), and no exchange: all weights of a layer's experts are gathered over
  ``expert``, exactly once in each pass, 2 in a training step. Their gradients are reduced over it, whole.
- **Parameters** that live on ``fsdp`` are gathered over it, once in a forward pass, at most twice in a training step:
  sum of their bytes on this device. Those that only the optimizer splits (ZeRO 1 and 2) are gathered once, after the
  update.
- **Gradients** are reduced over the axes that split the batch and not the parameter, all at once or axis by axis. Each
  crosses each of these axes once: of all reductions over any axes that include one, together, at most the sum of the
  parameter's bytes, whole over ``fsdp``.
- **Activations** over ``tensor``: see :func:`_activations`.
- **Logits** are gathered over ``tensor`` in inference, once: ``b v / tensor`` floats.
- **Micro-batches** (``micro``) each send all of this, and where auxiliary losses need it
  (:mod:`gshardx.train.accumulate`), a forward pass more.
- **Statistics**: some vectors over experts in each MoE layer, and some scalars a parameter (:func:`_small`).

Nothing else: no token or gate is ever gathered over ``expert``, and no weight of experts that are not merged.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gshardx.layers import Auto, MoE, Ragged
from gshardx.layers.balance import Sums
from gshardx.layers.dispatch import Dispatcher, choose_dispatcher
from gshardx.layers.mixing import Mixing
from gshardx.layers.routing import RouterBase, Routing
from gshardx.models.attention import summed
from gshardx.models.build import Blueprint, Params
from gshardx.models.moe import build_router
from gshardx.sharding import Allowance, Budget, bytes_per_device
from gshardx.sharding.collectives import REDUCTIONS

Step = Literal["train", "forward", "prefill", "decode"]
BATCH_AXES = ("data", "fsdp", "expert")
_FLOAT = 4


class _Sizes(NamedTuple):
    """Of one step on one device; letters as in the module's docstring."""

    step: Step
    first_pass: bool
    """Whether a forward pass over all micro-batches comes before the others."""
    b: int
    t: int
    s: int
    k: int
    c: int
    moe_layers: int
    dense_layers: int
    stretch: int | None
    """Tokens that share a merged network, if experts are merged."""
    expert: int
    """Devices along ``expert``."""
    platform: str
    """ "cpu", "gpu" or "tpu"."""

    @property
    def g(self) -> int:
        return self.b * self.t // self.s

    @property
    def backward(self) -> bool:
        return self.step == "train"


def step_budget(
    plan: Blueprint, mesh: Mesh, step: Step, *, rows: int, tokens: int, split: Params | None = None, micro: int = 1
) -> Budget:
    """The budget of ``step`` of the model ``plan`` on ``mesh``.

    Args:
        plan: the model, with the places of its parameters.
        mesh: where it runs.
        step: "train", "forward" (the evaluation), "prefill" or "decode".
        rows: sequences in the step, over all devices.
        tokens: of each row in this call; 1 in decode.
        split: abstract parameters where the optimizer's moments live, if elsewhere than the parameters (ZeRO 1 and 2).
        micro: micro-batches of a training step.
    """
    moe = cast(MoE, plan.bind(plan.params).stack.units.sparse.feed_forward)
    first_pass = micro > 1 and _has_loss_over_batch(plan, moe.group_size or tokens)
    sizes = _sizes(plan, mesh, moe, step, rows // micro, tokens)._replace(first_pass=first_pass)
    wide = {axis for axis, size in mesh.shape.items() if size > 1}
    small = _small(plan, moe, sizes)
    allowances: list[Allowance] = []
    told = _told(sizes, wide)
    gathered = [_gathered(plan, sizes, split)] if "fsdp" in wide else []
    if "expert" in wide and sizes.stretch is not None:
        gathered.append(_blended(plan, sizes))
    elif "expert" in wide:
        allowances += _exchanges(plan, moe, sizes)
    for one in gathered:
        if told and told.axes == one.axes:
            one, told = _added(one, told), None
        allowances.append(one)
    allowances += [told] if told else []
    if "tensor" in wide:
        allowances += _activations(plan, moe, sizes, mesh.shape["tensor"], small)
    crossed = [axis for axis in BATCH_AXES if axis in wide and sizes.backward]
    if "tensor" in wide and (sizes.stretch is not None or isinstance(_dispatcher(moe, sizes), Ragged)):
        allowances += _of_output_biases(plan, crossed)
    # Statistics and norms go with the gradients.
    reduced = {axis: _reduced(plan.params, axis) + small for axis in crossed}
    if sizes.stretch is not None and "expert" in reduced:
        reduced["expert"] += mesh.shape["expert"] * sum(map(_whole, _of_experts(plan)))
    return Budget((*allowances, *_reductions(crossed)), small, reduced).times(micro)


def _has_loss_over_batch(plan: Blueprint, group: int) -> bool:
    moe, width = plan.config.moe, plan.config.width

    def sums() -> dict[str, Sums]:
        router: Any = build_router(moe, width, nnx.Rngs(0), plan.vocab)
        ids = jnp.zeros((1, group), jnp.int32)
        tokens, state = jnp.zeros((1, group, width)), router.initial_state()
        routing: Routing = router.reading(ids)(tokens, ids == 0, jax.random.key(0), state)
        return routing.loss_sums

    weighted = {"balance", *moe.losses}
    return any(len(found) != 2 for name, found in jax.eval_shape(sums).items() if name in weighted)


def _sizes(plan: Blueprint, mesh: Mesh, moe: MoE, step: Step, rows: int, tokens: int) -> _Sizes:
    config, training = plan.config, step == "train"
    s = (moe.group_size or tokens) if training else tokens
    router = cast(RouterBase, moe.router)
    k = router.choices(training)
    return _Sizes(
        step=step,
        first_pass=False,
        b=rows // math.prod(mesh.shape[axis] for axis in BATCH_AXES),
        t=tokens,
        s=s,
        k=k,
        c=router.capacity.slots(s, router.num_experts, k, training),
        moe_layers=config.moe_layers,
        dense_layers=config.layers - config.moe_layers,
        stretch=router.stretch(s),
        expert=mesh.shape["expert"],
        platform=str(mesh.devices.flat[0].platform),
    )


def _exchanges(plan: Blueprint, moe: MoE, z: _Sizes) -> list[Allowance]:
    """Slots: ``g e c m``. Sorted rows, padded: ``expert`` x bound rows each way, bound = b t min(k, e / expert), and
    the counts, e int32, once. Compact (not on CPUs): b t k rows leave and ``expert`` x bound come back, since the
    whole buffer counts; the counts, e int32, are gathered, or summed like statistics.

    XLA's CPU compiler widens bfloat16 to float32 unless it travels as bits (``moe.wire``); TPU's may narrow floats that
    are multiplied in bfloat16 anyway, so there half the bytes are enough.
    """
    e, repeats = moe.router.num_experts, plan.config.remat == "full" and z.backward
    passes = (1 + z.backward + repeats + z.first_pass) * z.moe_layers
    computed = 4 if z.platform == "cpu" else jnp.dtype(plan.config.dtype).itemsize
    wire = 2 if plan.config.moe.wire == "bfloat16" else computed
    narrowest = 1.0 if z.platform == "cpu" else 2 / wire
    dispatcher = _dispatcher(moe, z)
    if not isinstance(dispatcher, Ragged):
        return [_counted("all-to-all", 2 * passes, 2 * passes * z.g * e * z.c * plan.config.width * wire, narrowest)]
    counted = (1 + repeats + z.first_pass) * z.moe_layers
    row, bound = plan.config.width * wire, z.expert * z.b * z.t * min(z.k, e // z.expert)
    if dispatcher.exchange == "padded" or (dispatcher.exchange == "auto" and z.platform == "cpu"):
        sent = 2 * passes * bound * row + counted * e * _FLOAT
        return [_counted("all-to-all", 2 * passes + counted, sent, narrowest)]
    leaving = z.b * z.t * z.k
    if z.platform == "tpu":  # pads rows to its 128 lanes
        row = math.ceil(plan.config.width / 128) * 128 * wire
    return [
        _counted("ragged-all-to-all", 2 * passes, passes * (leaving + bound) * row, narrowest),
        Allowance("all-gather", ("expert",), counted, counted * e * _FLOAT),
    ]


def _blended(plan: Blueprint, z: _Sizes) -> Allowance:
    """Merged experts: of each MoE layer all weights, with what ``fsdp`` splits of them, in each pass. It keeps none, so
    that ``remat`` changes nothing."""
    weights = _of_experts(plan)
    passes = 1 + z.backward + z.first_pass
    narrow = jnp.dtype(plan.config.dtype).itemsize / _FLOAT  # than the parameters; not always on CPUs
    count, sent = passes * z.moe_layers * len(weights), passes * sum(map(_whole, weights))
    most = sent if z.platform == "cpu" else int(narrow * sent)
    return _counted("all-gather", count, most, narrow * sent / most)


def _of_experts(plan: Blueprint) -> list[Any]:
    """Abstract parameters that live on ``expert``, all layers'."""
    return [param for param in jax.tree.leaves(plan.params) if "expert" in _axes(param)]


def _whole(param: Any) -> int:
    """Bytes of a device's part, whole over ``fsdp``."""
    return bytes_per_device(param) * (param.sharding.mesh.shape["fsdp"] if "fsdp" in _axes(param) else 1)


def _counted(op: str, count: int, most: int, narrowest: float = 1.0) -> Allowance:
    """Exactly ``count`` over ``expert``, of ``most`` bytes, or as little as the part ``narrowest`` of them."""
    return Allowance(op, ("expert",), count, most, least=count, least_bytes=int(most * narrowest))


def _dispatcher(moe: MoE, z: _Sizes) -> Dispatcher:
    router = cast(RouterBase, moe.router)
    if not isinstance(moe.dispatcher, Auto):
        return moe.dispatcher
    if router.MIXES:
        return Mixing(moe.dispatcher.wire)
    return choose_dispatcher(
        group=z.s,
        hidden=moe.dispatcher.hidden,
        num_experts=router.num_experts,
        top_k=z.k,
        dropless=z.c == z.s,
        on=z.platform,
    ).dispatcher


def _told(z: _Sizes, wide: set[str]) -> Allowance | None:
    """Of an evaluation: each row's nats and right guesses, for every process."""
    axes = tuple(axis for axis in BATCH_AXES if axis in wide)
    return Allowance("all-gather", axes, 2, 2 * z.b * _FLOAT) if axes and z.step == "forward" else None


def _added(one: Allowance, other: Allowance) -> Allowance:
    count, sent = ((getattr(one, name) or 0) + (getattr(other, name) or 0) for name in ("count", "bytes_per_device"))
    return Allowance(one.op, one.axes, count, sent, least=one.least, least_bytes=one.least_bytes)


def _gathered(plan: Blueprint, z: _Sizes, split: Params | None) -> Allowance:
    count = sent = 0
    later = plan.params if split is None or not z.backward else split
    names = jax.tree.leaves(plan.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for now, after, axes in zip(jax.tree.leaves(plan.params), jax.tree.leaves(later), names, strict=True):
        passes = 1 + z.backward + z.first_pass
        times = passes * ("fsdp" in _axes(now)) + ("fsdp" in _axes(after) and "fsdp" not in _axes(now))
        count += times * (now.shape[0] if axes[0] == "layer" else 1)  # a stack is gathered layer by layer
        sent += times * bytes_per_device(after)
    return Allowance("all-gather", ("fsdp",), count, sent)


def _reductions(wide: list[str]) -> Iterator[Allowance]:
    """Over every subset of the axes that split the batch; :func:`_reduced` says how much."""
    for size in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, size):
            yield from (Allowance(op, axes) for op in REDUCTIONS)


def _of_output_biases(plan: Blueprint, crossed: list[str]) -> Iterator[Allowance]:
    """Their gradients, which sorted rows and merged experts reduce over ``tensor`` as well."""
    for size in range(1, len(crossed) + 1):
        for axes in itertools.combinations(crossed, size):
            yield Allowance("all-reduce", (*axes, "tensor"), bytes_per_device=_output_biases(plan))


def _output_biases(plan: Blueprint) -> int:
    """Bytes of the experts' output biases on a device, whole over ``fsdp``."""
    names = jax.tree.leaves(plan.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    both = zip(jax.tree.leaves(plan.params), names, strict=True)
    return sum(_whole(param) for param, axes in both if axes == ("layer", "expert", "embed"))


def _reduced(params: Params, axis: str) -> int:
    """Bytes of the gradients that cross ``axis``: of the parameters that it does not split, or that it gathers."""
    return sum(_whole(p) for p in jax.tree.leaves(params) if axis not in _axes(p) - {"fsdp"})


def _activations(plan: Blueprint, moe: MoE, z: _Sizes, tensor: int, small: int) -> list[Allowance]:
    """Partial sums over ``tensor``, in fp32 at most. With a = b t m, and x what an MoE layer's experts take in:

    - forward: the embedding a, each attention a, each dense network a, each MoE layer x; the loss 3 b t. Norms over all
      heads 2 b t an attention, for queries and keys.
    - backward, the gradients of inputs, one for each product that they enter: the logits' a, each attention 3 a
      (queries, keys, values; where they are latent: :func:`gshardx.models.attention.summed`), each dense network a or,
      gated, 2 a, each MoE layer x or 2 x (sorted rows one more; merged experts e for each mixture, and their output
      biases). Norms over all heads 2 b t again; of those of each head, the gradients of their 2 d weights.
    - ``remat``: the forward sums of each block again.
    """
    config = plan.config
    a = z.b * z.t * config.width * _FLOAT
    inputs = 2 if config.activation.endswith("glu") else 1
    rows = z.g * moe.router.num_experts * z.c
    extra = 0
    if z.stretch is not None:
        rows = z.b * z.t
    elif isinstance(_dispatcher(moe, z), Ragged):
        k, e = z.k, moe.router.num_experts
        rows, extra = z.b * z.t * (k if z.expert == 1 else z.expert * min(k, e // z.expert)), 1
    x = rows * config.width * _FLOAT
    mixtures = 0 if z.stretch is None else z.moe_layers * z.b * z.t // z.stretch * moe.router.num_experts * _FLOAT
    beside = z.moe_layers if config.moe.shared_hidden else 0
    forward = (config.layers + z.dense_layers + beside) * a + z.moe_layers * x
    backward = config.layers * z.b * z.t * summed(config) * _FLOAT
    backward += inputs * (z.dense_layers + beside) * a + (inputs + extra) * z.moe_layers * x
    backward += mixtures + (0 if z.stretch is None else _output_biases(plan))
    over, norms = config.attention.get("qk_norm", "none"), 2 * config.layers * _FLOAT
    forward += norms * z.b * z.t if over == "whole" else 0
    backward += norms * {"head": config.head_dim, "whole": z.b * z.t}.get(over, 0)
    if z.step in ("prefill", "decode"):
        logits = z.b * plan.vocab // tensor * _FLOAT
        return [
            Allowance("all-reduce", ("tensor",), bytes_per_device=a + forward),
            Allowance("all-gather", ("tensor",), 1, logits),
        ]
    total = a + forward + 3 * z.b * z.t * _FLOAT + small
    if z.backward:
        repeated = config.remat not in ("none", "dots")
        total += a + backward + repeated * forward + z.first_pass * (a + forward + small)
    return [Allowance("all-reduce", ("tensor",), bytes_per_device=total)]


def _small(plan: Blueprint, moe: MoE, z: _Sizes) -> int:
    """Bytes of scalars and statistics: in a training step two vectors over experts for each auxiliary loss and two for
    telemetry, its other sums (docs/routers), the vectors that its router carries, and for each parameter its part of
    the gradient's norm, twice. The evaluation and inference add up nothing."""
    if z.step != "train":
        return 0
    vectors = moe.router.num_experts * (2 + 2 * len(plan.config.moe.losses)) + 3 * z.k + 32
    vectors += sum(leaf.shape[1] for leaf in jax.tree.leaves(plan.router) if len(leaf.shape) == 2)
    scalars = 2 * len(jax.tree.leaves(plan.params)) + 8
    return _FLOAT * (z.moe_layers * vectors + scalars)


def _axes(array: Any) -> set[str]:
    """The mesh axes that split an abstract array."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in array.sharding.spec if entry is not None)
    return {axis for entry in entries for axis in entry if array.sharding.mesh.shape[axis] > 1}
