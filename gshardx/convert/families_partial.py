"""Families whose positions turn only a part of each head, or only some layers: nothing but tables."""

import math

from gshardx.convert.families_latent import BALANCE, BALANCED, GROUPS, LOAD, RENORMALISED, ROUTED, TOGETHER
from gshardx.convert.family import (
    ATTENTION,
    BIAS,
    COMMON,
    DENSE,
    EXPERTS,
    FINE_HIDDEN,
    HIDDEN,
    LAYER,
    MOE,
    MOE_HIDDEN,
    NEEDS,
    NORM_OF_HEADS,
    OUTSIDE,
    PLAIN_LOGITS,
    QUANTISED,
    TOP_K,
    WHOLE_HEADS,
    Family,
)
from gshardx.convert.rules import Rule
from gshardx.convert.settings import Setting
from gshardx.errors import BadInput


def _read_width(factor: float, head_dim: int) -> int:
    """How many of a head's entries turn."""
    width = int(head_dim * factor)
    if width < 2 or width % 2:
        raise BadInput(
            f"partial_rotary_factor = {factor}: {width} of a head's {head_dim} entries would turn, which are no whole "
            f"pairs; supported: an even number"
        )
    return width


def _write_width(width: int, head_dim: int) -> float:
    factor = width / head_dim
    return factor if int(head_dim * factor) == width else math.nextafter(factor, 1.0)  # who reads it rounds down


_GLM = (
    *COMMON, PLAIN_LOGITS, HIDDEN, FINE_HIDDEN, TOP_K, *ROUTED, *GROUPS, RENORMALISED,
    Setting(
        "rope.width", "partial_rotary_factor|rope_parameters.partial_rotary_factor",
        lambda ours: _read_width(0.5, ours["head_dim"]), _read_width, _write_width, beside=("head_dim",),
    ),
    Setting(
        "attention.qk_norm", "use_qk_norm", "none", lambda yes: "head" if yes else "none", lambda ours: ours == "head"
    ),
    Setting(  # the output has none even so
        "attention.biases", "attention_bias", "none", lambda yes: "qkv" if yes else "none", lambda ours: ours == "qkv"
    ),
)  # fmt: skip


def _read_turned(turned: list[int], every: int | None, layers: int) -> int | None:
    """Every how many layers one turns nothing; None: none. An empty list says what ``no_rope_layer_interval`` does."""
    if not turned:
        return every
    found = next((n for n in (None, *range(1, layers + 1)) if _turned(n, layers) == turned[:layers]), -1)
    if found == -1:
        raise BadInput(f"no_rope_layers = {turned} is not supported yet; supported: every nth 0, the others 1")
    return found


def _turned(every: int | None, layers: int) -> list[int]:
    return [int(not every or (layer + 1) % every != 0) for layer in range(layers)]


def _read_types(types: list[str], every: int | None, layers: int) -> int | None:
    if types != _types(every, layers):
        raise BadInput(
            f"layer_types = {types} is not supported yet; supported: full_attention where nothing turns "
            f"(no_rope_layers), else chunked_attention"
        )
    return every


def _types(every: int | None, layers: int) -> list[str]:
    return ["chunked_attention" if turned else "full_attention" for turned in _turned(every, layers)]


def _read_sparse(sparse: list[int], layers: int) -> int:
    every = sparse[0] + 1 if sparse else 0
    if not every or sparse != _sparse(every, layers):
        raise BadInput(f"moe_layers = {sparse} is not supported yet; supported: the last of every n")
    return every


def _sparse(every: int, layers: int) -> list[int]:
    return list(range(every - 1, layers, every))


_EVERY, _FLOOR = "attention.full_every", "attention.temperature_floor"
_LLAMA4 = (
    *COMMON, PLAIN_LOGITS, BIAS, EXPERTS, TOP_K,
    Setting("rope_base", "rope_theta|rope_parameters.rope_theta", 500_000.0, float),
    Setting("hidden", "intermediate_size_mlp"),
    Setting("moe.shared_hidden", "intermediate_size"),
    MOE_HIDDEN,
    Setting("moe.every", "interleave_moe_layer_step", 1),
    Setting("moe.every", "moe_layers", lambda ours: ours["moe.every"], _read_sparse, _sparse, beside=("layers",)),
    Setting("attention.chunk", "attention_chunk_size"),
    # Each reads what the last one found, and all are written.
    Setting(_EVERY, "no_rope_layer_interval", 4, write=lambda every: every or 4, of_none=True),
    Setting(
        _EVERY, "no_rope_layers", lambda ours: ours[_EVERY], _read_turned,
        lambda every, _, layers: _turned(every, layers), beside=(_EVERY, "layers"), of_none=True,
    ),
    Setting(
        _EVERY, "layer_types", lambda ours: ours[_EVERY], _read_types, lambda every, _, layers: _types(every, layers),
        beside=(_EVERY, "layers"), of_none=True,
    ),
    Setting(
        "attention.qk_norm", "use_qk_norm", "l2", lambda yes: "l2" if yes else "none", lambda ours: ours == "l2"
    ),
    Setting(_FLOOR, "floor_scale", 8192, write=lambda floor: floor or 8192, of_none=True),
    Setting(
        _FLOOR, "attn_temperature_tuning", lambda ours: ours[_FLOOR], lambda tuned, floor: floor if tuned else None,
        lambda floor, _: floor is not None, beside=(_FLOOR,), of_none=True,
    ),
    Setting("attention.temperature_scale", "attn_scale", 0.1),
)  # fmt: skip
_FEED_FORWARD, _EXPERTS = LAYER + "feed_forward.", "sparse.feed_forward.experts."
_BESIDE = "sparse.feed_forward.beside.feed_forward."
_OF_LLAMA4 = (
    Rule(_FEED_FORWARD + "router.weight", "e m -> m e", ("sparse.feed_forward.router.kernel",)),
    Rule(_FEED_FORWARD + "experts.gate_up_proj", "e m (p h) -> p e m h", (_EXPERTS + "w_gate", _EXPERTS + "w_up")),
    Rule(_FEED_FORWARD + "experts.down_proj", "e h m -> e h m", (_EXPERTS + "w_down",)),
    Rule(_FEED_FORWARD + "shared_expert.gate_proj.weight", "s m -> m s", (_BESIDE + "w_gate",)),
    Rule(_FEED_FORWARD + "shared_expert.up_proj.weight", "s m -> m s", (_BESIDE + "w_up",)),
    Rule(_FEED_FORWARD + "shared_expert.down_proj.weight", "m s -> s m", (_BESIDE + "w_down",)),
    Rule(_FEED_FORWARD + "gate_proj.weight", "f m -> m f", ("dense.feed_forward.w_gate",)),
    Rule(_FEED_FORWARD + "up_proj.weight", "f m -> m f", ("dense.feed_forward.w_up",)),
    Rule(_FEED_FORWARD + "down_proj.weight", "m f -> f m", ("dense.feed_forward.w_down",)),
)

PARTIAL = (
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _GLM,
        (*NEEDS, *QUANTISED),
        BALANCED,
        (*OUTSIDE, *ATTENTION, *NORM_OF_HEADS, *DENSE, *MOE, *TOGETHER, BALANCE),
        zeros=(LOAD,),
        layers_after="num_nextn_predict_layers|num_mtp_layers",
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        _LLAMA4,
        (*NEEDS, WHOLE_HEADS, *QUANTISED),
        {
            "moe.router": "sigmoid_bias", "moe.capacity_factor": None, "moe.losses": {"balance": 1e-3},
            "moe.router_options": {"renormalise": False, "rate": 0.0, "weigh": "input", "choose_by": "logits"},
            "rope.interleaved": True, "attention.nope": True,
        },
        (*OUTSIDE, *ATTENTION, *_OF_LLAMA4),
        zeros=("router.0", LOAD),
    ),
)  # fmt: skip
"""In the order in which they are tried."""
