"""Between a public model's ``rope_scaling`` and our options of rotary positions."""

import math
from collections.abc import Mapping
from typing import Any

SCALINGS = ("default", "linear", "llama3", "yarn")
"""Types of theirs; ``longrope`` is read where a family says so."""


def read_rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :class:`gshardx.layers.Rope`.

    Args:
        theirs: ``rope_scaling`` of the hub's files, or ``rope_parameters``.

    Raises:
        KeyError: what this type needs is not there.
    """
    kind = theirs.get("rope_type", theirs.get("type"))
    if kind not in SCALINGS[1:]:
        return {}
    ours: dict[str, Any] = {"scaling": kind, "factor": float(theirs["factor"])}
    if kind == "llama3":
        ours |= {"low": float(theirs["low_freq_factor"]), "high": float(theirs["high_freq_factor"])}
    elif kind == "yarn":
        ours |= {"low": float(theirs.get("beta_slow") or 1), "high": float(theirs.get("beta_fast") or 32)}
        ours |= {"truncate": theirs.get("truncate", True), "magnitude": _magnitude(theirs)}
    if kind != "linear":
        ours["original_length"] = theirs["original_max_position_embeddings"]
    return {name: value for name, value in ours.items() if value is not None}


def _magnitude(theirs: Mapping[str, Any]) -> float | None:
    """Of YaRN; None: what follows from the factor alone."""
    if theirs.get("attention_factor") is not None:
        return float(theirs["attention_factor"])
    if not (theirs.get("mscale") and theirs.get("mscale_all_dim")):
        return None
    grown = max(0.0, 0.1 * math.log(theirs["factor"]))
    return (grown * theirs["mscale"] + 1.0) / (grown * theirs["mscale_all_dim"] + 1.0)


def write_rope(ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling``, or None for positions that are not stretched; the inverse."""
    kind = ours.get("scaling", "none")
    if kind not in SCALINGS[1:]:
        return None
    theirs: dict[str, Any] = {"rope_type": kind, "factor": ours["factor"]}
    if kind == "llama3":
        theirs |= {"low_freq_factor": ours["low"], "high_freq_factor": ours["high"]}
    elif kind == "yarn":
        theirs |= {"beta_slow": ours["low"], "beta_fast": ours["high"], "truncate": ours["truncate"]}
        if ours["magnitude"] is not None:
            theirs["attention_factor"] = ours["magnitude"]
    return theirs if kind == "linear" else theirs | {"original_max_position_embeddings": ours["original_length"]}


def read_longrope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The same of models whose positions are plain or LongRoPE's (arXiv 2402.13753): their short factors and magnitude,
    which are those of texts of at most ``original_length`` tokens."""
    if theirs.get("rope_type", theirs.get("type")) != "longrope":
        return {}
    return {
        "scaling": "longrope",
        "factors": [float(factor) for factor in theirs["short_factor"]],
        "magnitude": float(theirs["short_mscale"]),
        "original_length": theirs["original_max_position_embeddings"],
    }


def write_longrope(ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inverse; longer texts have the same factors."""
    if ours.get("scaling", "none") != "longrope":
        return None
    magnitude = 1.0 if ours["magnitude"] is None else ours["magnitude"]
    return {
        "rope_type": "longrope",
        "short_factor": ours["factors"],
        "long_factor": ours["factors"],
        "short_mscale": magnitude,
        "long_mscale": magnitude,
        "original_max_position_embeddings": ours["original_length"],
    }
