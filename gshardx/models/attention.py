"""From a config to attention: its kind and sizes, and the options that ``model.attention`` and ``model.rope`` name."""

import inspect
from typing import Any, NamedTuple

from flax import nnx

from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.layers import Attention, LatentAttention, Reach, Rope
from gshardx.layers.latent import check_latent
from gshardx.layers.memory import Kept
from gshardx.models.options import Options, check_options, options_of

KINDS = {"grouped": Attention, "latent": LatentAttention}
"""What ``model.attention.kind`` may be."""
_FROM_CONFIG = {
    "width", "heads", "kv_heads", "head_dim", "rope", "output_scale", "norm_epsilon", "scale", "rngs",
}  # fmt: skip
_LATENT_SIZES = inspect.signature(check_latent).parameters.keys()


def attention_options(kind: str) -> Options:
    """What ``model.attention`` may hold beside that kind."""
    return options_of(KINDS[kind], without=_FROM_CONFIG)


def rope_options() -> Options:
    """What ``model.rope`` may hold."""
    return options_of(Rope, without={"base"})


def check_attention(config: ModelConfig) -> tuple[Rope, dict[str, Any]]:
    """The rotary positions, and the other options of attention.

    Raises:
        BadInput: one is unknown, missing, of another type, or does not fit.
    """
    turning = check_options("model.rope", config.rope, rope_options(), "rope")
    options = _check_options(config)
    try:
        rope = Rope(base=config.rope_base, **turning)
        rope.frequencies(config.head_dim if config.grouped_heads else options["rope_dim"])
    except BadInput as error:
        raise BadInput(f"model.rope.{error}") from error
    try:
        Reach(**{name: options[name] for name in ("window", "chunk", "full_every") if name in options})
        if options.get("temperature_floor") == 0:
            raise BadInput("temperature_floor = 0: must be 1 or more")
    except BadInput as error:
        raise BadInput(f"model.attention.{error}") from error
    return rope, options


def _check_options(config: ModelConfig) -> dict[str, Any]:
    given = {name: value for name, value in config.attention.items() if name != "kind"}
    if config.attention_kind not in KINDS:
        raise BadInput(f"model.attention.kind = {config.attention_kind}: use one of {', '.join(KINDS)}")
    known = attention_options(config.attention_kind)
    of = "attention" if config.grouped_heads else f"attention of kind {config.attention_kind}"
    options = check_options("model.attention", given, known, of)
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise BadInput(f"model.attention.{name}: {of} needs it (docs/attention.md)")
    if not config.grouped_heads:
        try:
            check_latent(**{"q_rank": None} | {name: options[name] for name in _LATENT_SIZES & options.keys()})
        except BadInput as error:
            raise BadInput(f"model.attention.{error}") from error
    return options


def build_attention(config: ModelConfig, output_scale: float, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """Raises BadInput as :func:`check_attention`."""
    rope, options = check_attention(config)
    common: dict[str, Any] = {
        "rope": rope, "output_scale": output_scale, "scale": config.scales.get("attention"), "rngs": rngs,
    }  # fmt: skip
    if not config.grouped_heads:
        return LatentAttention(config.width, config.heads, **common, **options)
    own = options | {"norm_epsilon": config.norm_epsilon}
    return Attention(config.width, config.heads, config.kv_heads, config.head_dim, **common, **own)


def kept(config: ModelConfig) -> Kept:
    """Of a config that :func:`check_attention` lets pass."""
    if config.grouped_heads:
        return Kept(config.kv_heads, config.head_dim)
    rank = config.attention["kv_rank"]
    return Kept(1, rank + config.attention["rope_dim"], rank)


class Matrix(NamedTuple):
    """One of attention's projections; ``split``: whether ``tensor`` splits its side of heads, which are the outputs but
    for the last matrix."""

    inputs: int
    outputs: int
    split: bool = True


def matrices(config: ModelConfig) -> list[Matrix]:
    """Of a config that :func:`check_attention` lets pass, from queries to the output."""
    m, n, said = config.width, config.heads, config.attention
    if config.grouped_heads:
        heads, kv_heads = n * config.head_dim, config.kv_heads * config.head_dim
        return [Matrix(m, heads), Matrix(m, kv_heads), Matrix(m, kv_heads), Matrix(heads, m)]
    rank, rope, nope, value = (said[name] for name in ("kv_rank", "rope_dim", "nope_dim", "value_dim"))
    q_rank = said.get("q_rank")
    queries = [Matrix(m, q_rank, False)] if q_rank else []
    return [
        *queries,
        Matrix(q_rank or m, n * (nope + rope)),
        Matrix(m, rank + rope, False),
        Matrix(rank, n * (nope + value)),
        Matrix(n * value, m),
    ]


class Vectors(NamedTuple):
    """How many parameters of attention are in no matrix: norms, biases, sinks; those that ``tensor`` splits apart."""

    whole: int
    split: int


def vectors(config: ModelConfig) -> Vectors:
    """Of a config that :func:`check_attention` lets pass."""
    m, n, d, said = config.width, config.heads, config.head_dim, config.attention
    if not config.grouped_heads:
        q_rank, rank = said.get("q_rank") or 0, said["kv_rank"]
        biases = q_rank + rank + said["rope_dim"] + m if said.get("biases") else 0
        return Vectors(q_rank + rank + biases, 0)
    norm, biases = said.get("qk_norm"), said.get("biases", "none")
    whole = (2 * d if norm == "head" else 0) + (m if biases == "qkvo" else 0)
    split = d * (n + 2 * config.kv_heads) if biases != "none" else 0
    split += d * (n + config.kv_heads) if norm == "whole" else 0
    return Vectors(whole, split + (n if said.get("sinks") else 0))


def widths(config: ModelConfig) -> tuple[int, int]:
    """Of a head's keys and of its values, where all heads are made (in training)."""
    if config.grouped_heads:
        return config.head_dim, config.head_dim
    return config.attention["nope_dim"] + config.attention["rope_dim"], config.attention["value_dim"]


def summed(config: ModelConfig) -> int:
    """Entries of a token whose gradients the backward pass adds up over ``tensor``: what the projections to heads take
    in, and what heads share."""
    if config.grouped_heads:
        return 3 * config.width
    return (config.attention.get("q_rank") or config.width) + kept(config).width
