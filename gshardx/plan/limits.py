"""A file of limits that a plan must keep: what a team's own CI holds a model to.

The keys are those of ``--json``, each a ceiling::

    memory: {peak: 90e9}
    flops_per_device: 2e13
    hlo_instructions: 9000
    predicted_step_seconds: 0.4
    collectives:
      - {op: all-to-all, axes: [expert], count: 72, bytes_per_device: 1.3e9}
      - {op: all-reduce, axes: [expert]}     # any number, any size
    small: 65536                             # bytes of other reductions

With ``collectives``, what the list does not name is not allowed; without it, anything is.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gshardx.errors import BadInput
from gshardx.plan.memory import KINDS
from gshardx.plan.report import Plan
from gshardx.sharding import Allowance, Budget, MeshConfig

_NUMBERS = ("flops_per_device", "hlo_instructions", "predicted_step_seconds")
_COLLECTIVE = ("op", "axes", "count", "bytes_per_device", "least", "least_bytes")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Ceilings; what is not named is free."""

    memory: Mapping[str, float]
    numbers: Mapping[str, float]
    collectives: Budget | None

    def breaches(self, plan: Plan) -> list[str]:
        """One line for each limit that ``plan`` breaks."""
        lines = []
        for kind, most in self.memory.items():
            found = plan.memory.get(kind)
            if found is None or found > most:
                lines.append(f"memory.{kind} is {_number(found)} bytes a device; the limit is {_number(most)}")
        for name, most in self.numbers.items():
            value = getattr(plan, name)
            if value is None or value > most:
                lines.append(f"{name} is {_number(value)}; the limit is {_number(most)}")
        if self.collectives is not None:
            if plan.collectives is None:
                lines.append("collectives are not known, because the step does not fit")
            else:
                lines += self.collectives.breaches(plan.collectives)
        return lines


def read_limits(path: Path) -> Limits:
    """Read a file of limits, YAML or JSON.

    Raises:
        BadInput: it can't be read, has a key that does not exist, or a value of another type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--budget {path}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"--budget {path}: not YAML ({error})") from error
    if not isinstance(tree, dict) or not tree:
        raise BadInput(f"--budget {path}: no limits in it; write some, for example hlo_instructions: 9000")
    where = f"--budget {path}"
    _known(where, tree, ("memory", "collectives", "small", *_NUMBERS))
    memory = tree.get("memory", {})
    if not isinstance(memory, dict):
        raise BadInput(f"{where}: memory is a mapping of kinds, for example {{peak: 9e10}}")
    _known(f"{where}: memory", memory, (*KINDS, "peak"))
    return Limits(
        {kind: _limit(f"{where}: memory.{kind}", value) for kind, value in memory.items()},
        {name: _limit(f"{where}: {name}", tree[name]) for name in _NUMBERS if name in tree},
        _budget(where, tree),
    )


def _budget(where: str, tree: Mapping[str, Any]) -> Budget | None:
    if "collectives" not in tree:
        if "small" in tree:
            raise BadInput(f"{where}: small belongs to collectives; list those too")
        return None
    listed = tree["collectives"]
    if not isinstance(listed, list):
        raise BadInput(f"{where}: collectives is a list, for example [{{op: all-to-all, axes: [expert], count: 8}}]")
    allowances = []
    for number, item in enumerate(listed):
        at = f"{where}: collectives[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get("axes"), list) or "op" not in item:
            raise BadInput(f"{at}: needs op and axes, for example {{op: all-to-all, axes: [expert]}}")
        _known(at, item, _COLLECTIVE)
        _known(f"{at}.axes", dict.fromkeys(map(str, item["axes"])), tuple(MeshConfig().shape))
        limits = {key: int(_limit(f"{at}.{key}", item[key])) for key in _COLLECTIVE[2:] if key in item}
        allowances.append(_allowance(at, str(item["op"]), item["axes"], limits))
        if (allowances[-1].op, allowances[-1].axes) in {(one.op, one.axes) for one in allowances[:-1]}:
            raise BadInput(f"{at}: {item['op']} over {'*'.join(allowances[-1].axes)} is listed twice; add them up")
    return Budget(tuple(allowances), small=int(_limit(f"{where}: small", tree.get("small", 0))))


def _allowance(at: str, op: str, axes: Iterable[str], limits: Mapping[str, int]) -> Allowance:
    """With ``axes`` in the mesh's order, as collectives name them."""
    try:
        return Allowance(op, tuple(axis for axis in MeshConfig().shape if axis in axes), **limits)
    except BadInput as error:
        raise BadInput(f"{at}: {error}") from error


def _known(where: str, tree: Mapping[Any, Any], keys: tuple[str, ...]) -> None:
    for key in tree:
        if key not in keys:
            nearest = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
            what = "mesh axis" if where.endswith(".axes") else "key"
            raise BadInput(f"{where}: unknown {what} {key}; did you mean {nearest}?")


def _limit(where: str, value: Any) -> float:
    # YAML 1.1 reads 9e10 as a string.
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise BadInput(f"{where} = {value}: a limit is a number, 0 or more")
    return number


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.6g}" if value < 1 else f"{value:,.0f}"
