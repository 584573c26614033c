"""Between a public model's config.json and our ModelConfig: settings as data, read in one direction and the other."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gshardx.cli import flatten
from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.models.attention import attention_options, rope_options
from gshardx.models.moe import router_options
from gshardx.models.options import Options, decoder_options

REQUIRED = object()
"""Default of a setting that every config.json has."""


class Setting(NamedTuple):
    """One of our keys and one of theirs.

    Attributes:
        ours: of ModelConfig, dotted.
        theirs: dotted; spellings of several generations are parted by |, and the first is written.
        default: where they have none, or null; a function of our keys so far.
        read, write: from their value to ours, and back.
        beside: our keys, read before, whose values both are given too.
        of_none: whether ``write`` is asked what None is written as; else it is null.
        only: another key of theirs and the value of it without which this one is void, and has no default.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    read: Callable[..., Any] = lambda value: value
    write: Callable[..., Any] = lambda value: value
    beside: tuple[str, ...] = ()
    only: tuple[str, Any] | None = None
    of_none: bool = False


class Need(NamedTuple):
    """A key of theirs that must have one of these values, since we lack what others mean; see Setting for ``theirs``.

    ``unless``: another key and the value of it that makes this one void.
    """

    theirs: str
    values: tuple[Any, ...]
    unless: tuple[str, Any] | None = None


def find(config: Mapping[str, Any], spellings: str) -> Any:
    """The value of the first spelling that is there and not null, or None."""
    for spelling in spellings.split("|"):
        value: Any = config
        for part in spelling.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def read_settings(
    config: Mapping[str, Any], settings: Iterable[Setting], needs: Iterable[Need], fixed: Mapping[str, Any], where: str
) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        config: its content.
        settings, needs, fixed: of its family; ``fixed`` are our keys that all of it share.
        where: what errors call the file.

    Raises:
        BadInput: a key is missing or of another type, or asks for what we lack.
    """
    for need in needs:
        value = find(config, need.theirs)
        void = need.unless is not None and find(config, need.unless[0]) == need.unless[1]
        if value is not None and value not in need.values and not void:
            known = ", ".join(str(one) for one in need.values) or "none"
            key = need.theirs.replace("|", " or ")
            raise BadInput(f"{where}: {key} = {value} is not supported yet; supported: {known}")
    ours: dict[str, Any] = {}
    for setting in settings:
        value = find(config, setting.theirs)
        if setting.only is not None and find(config, setting.only[0]) != setting.only[1]:
            continue
        try:
            if value is not None:
                ours[setting.ours] = setting.read(value, *(ours[key] for key in setting.beside))
            elif setting.default is REQUIRED:
                raise BadInput(f"no {setting.theirs.replace('|', ' or ')} there; is it this model's own file?")
            else:
                ours[setting.ours] = setting.default(ours) if callable(setting.default) else setting.default
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
            if isinstance(error, BadInput):
                raise BadInput(f"{where}: {error}") from error
            lacking = f"no {error.args[0]} in it" if isinstance(error, KeyError) else "can't be read"
            raise BadInput(f"{where}: {setting.theirs.split('|')[0]} = {value}: {lacking}") from error
    try:
        return build(ModelConfig, ours | dict(fixed))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{where}: {error}") from error


def build(kind: type[Any], flat: Mapping[str, Any]) -> Any:
    """A dataclass of dataclasses from dotted keys."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        below = {key[len(field.name) + 1 :]: value for key, value in flat.items() if key.startswith(f"{field.name}.")}
        if isinstance(whole := flat.get(field.name), Mapping):
            given[field.name] = {**whole, **{key: value for key, value in below.items() if value is not None}}
        elif field.name in flat:
            given[field.name] = whole
        elif below and dataclasses.is_dataclass(section := _default(field)):
            given[field.name] = build(type(section), below)
        elif below:
            given[field.name] = {key: value for key, value in below.items() if value is not None}
    return kind(**given)


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def write_settings(model: ModelConfig, settings: Iterable[Setting]) -> dict[str, Any]:
    """The part of a config.json that ``settings`` say."""
    written: dict[str, Any] = {}
    for setting in settings:
        if not setting.theirs:
            continue
        value = get(model, setting.ours)
        place, (*front, last) = written, setting.theirs.split("|")[0].split(".")
        for part in front:
            place = place.setdefault(part, {})
        beside = (get(model, key) for key in setting.beside)
        place[last] = None if value is None and not setting.of_none else setting.write(value, *beside)
        if setting.only is not None and value is not None:
            written[setting.only[0]] = setting.only[1]
    return written


def get(model: ModelConfig, key: str) -> Any:
    """The value of a dotted key, or None."""
    value: Any = model
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


_TRAINING = ("capacity_factor", "group_size", "dispatcher", "wire", "losses", "adaptive_balance")
_TRAINING_OPTIONS = ("rate", "input_jitter", "output_masking", "token_drop", "priority", "round_to")
_ELSEWHERE = ("dtype", "float32", "remat", "dropout", "vocab_size")


def at_inference(model: ModelConfig) -> ModelConfig:
    """The model with every key at its default that changes nothing there, and its router's options all said."""
    plain, moe = ModelConfig(), model.moe
    same: dict[str, Any] = {name: getattr(plain.moe, name) for name in _TRAINING}
    known = router_options(moe.router)
    options = _said(known, moe.router_options)
    options |= {name: known[name].default for name in _TRAINING_OPTIONS if name in known}
    if options.get("softmax") == "after" or moe.num_experts == 1:
        options |= {"softmax": "after", "renormalise": True}
    unused: dict[str, Any] = {} if moe.every > 1 or moe.dense_first else {"hidden": plain.hidden}
    unused |= {name: getattr(plain, name) for name in _ELSEWHERE}
    shared = moe.shared if moe.shared_hidden else plain.moe.shared
    inner = dataclasses.replace(moe, **same, router_options=options, shared=shared)
    kind = model.attention_kind
    attending = {"kind": kind} | _said(attention_options(kind), model.attention)
    turning = _said(rope_options(), model.rope)
    whole = dataclasses.asdict(decoder_options(model))
    turning["width"] = turning["width"] or (model.head_dim if model.grouped_heads else attending["rope_dim"])
    if not model.grouped_heads:
        unused |= {"kv_heads": model.heads, "head_dim": plain.head_dim}
    return dataclasses.replace(model, moe=inner, rope=turning, attention=attending, options=whole, **unused)


def _said(known: Options, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the default of each that is not given."""
    return {name: parameter.default for name, parameter in known.items()} | dict(given)


def difference(model: ModelConfig, other: ModelConfig) -> str | None:
    """The first of our keys by which two models compute something else at inference, with both values."""
    first, second = (dict(flatten(dataclasses.asdict(at_inference(one)))) for one in (model, other))
    for key in first | second:
        if first.get(key) != second.get(key):
            return f"model.{key} = {first.get(key)}, not {second.get(key)}"
    return None
