"""Options that a config names in mappings: those of a constructor here, each known and of its type."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from gshardx.config import ModelConfig
from gshardx.errors import BadInput
from gshardx.layers.norm import Norm

Options = Mapping[str, inspect.Parameter]


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
    """What ``model.options`` may hold.

    Attributes:
        norm: of the residual stream, before each branch and at the end: "rms" (arXiv 1910.07467) or "layer", with a
            bias (arXiv 1607.06450).
        logits_bias: add a learned bias to the logits.
    """

    norm: Norm = "rms"
    logits_bias: bool = False


def decoder_options(config: ModelConfig) -> DecoderOptions:
    """Raises:
    BadInput: one is unknown, or of another type.
    """
    return DecoderOptions(**check_options("model.options", config.options, options_of(DecoderOptions, set()), "model"))


def options_of(made: type[Any], without: set[str]) -> Options:
    """What the class ``made`` is constructed with, but for ``without``."""
    parameters = inspect.signature(made.__init__).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in without | {"self"}}


def check_options(where: str, given: Mapping[str, Any], known: Options, of: str) -> dict[str, Any]:
    """``given``, each known and of its type.

    Args:
        where: the mapping's key in a config.
        of: what errors say has no such option.

    Raises:
        BadInput: otherwise, with the nearest name or the values that would do.
    """
    for name, value in given.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise BadInput(f"{where}.{name}: {of} has no such option; did you mean {nearest!r}?")
        _check(f"{where}.{name}", value, known[name].annotation)
    return dict(given)


def _check(where: str, value: Any, wanted: Any) -> None:
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise BadInput(f"{where} = {value}: use one of {', '.join(map(str, get_args(wanted)))}")
        return
    kinds = get_args(wanted) if NoneType in get_args(wanted) else (wanted,)
    if value is None and NoneType in kinds:
        return
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise BadInput(f"{where} = {value}: expected a list")
        for number, one in enumerate(value):
            _check(f"{where}[{number}]", one, get_args(kind)[0])
    elif isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, kind)):
        raise BadInput(f"{where} = {value}: expected {kind.__name__}")
    elif not isinstance(value, bool) and not 0 <= value < math.inf:
        raise BadInput(f"{where} = {value}: must be 0 or more, and finite")
