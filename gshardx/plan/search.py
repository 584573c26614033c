"""Looking for a better way to train a config on a topology: rank by formulas, compile the best, say why one won."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from gshardx.config import Config
from gshardx.errors import BadInput
from gshardx.plan.estimate import Estimate, can_lie_on, estimate
from gshardx.plan.program import Serving
from gshardx.plan.report import Plan, make_plan
from gshardx.plan.topology import Topology
from gshardx.sharding import MeshConfig

_CAPACITY = (1.0, 1.25, 2.0)
_REMAT = ("none", "dots", "keep_all_to_all", "full")
"""Without "offload": the formulas know nothing of the way to the host's memory."""
_BATCHES = (0.5, 2, 4)
_MICRO = (1, 2, 4, 8)
"""Micro-batches of a step of the config's own batch."""
_COMPILED = 4
"""Plans to compile; more, up to _AT_MOST, while none of them fits."""
_AT_MOST = 12
_OTHERS = 2
"""Plans to try for the best that learns something else."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the config, and what the formulas say of it.

    ``learns_the_same``: batch and capacity are the config's own, so that only speed and memory differ.
    """

    config: Config
    estimate: Estimate
    learns_the_same: bool

    @property
    def flags(self) -> str:
        mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in self.config.mesh.shape.items())
        capacity = self.config.model.moe.capacity_factor
        return (
            f"{mesh} --model.remat {self.config.model.remat} --train.batch_size {self.config.train.batch_size} "
            f"--train.accumulation_steps {self.config.train.accumulation_steps} "
            f"--model.moe.capacity_factor {'null' if capacity is None else capacity}"
        )

    @property
    def microbatch(self) -> int:
        """Sequences of one device at a time."""
        train = self.config.train
        return train.batch_size // train.accumulation_steps // self.config.mesh.batch_shards


@dataclasses.dataclass(frozen=True)
class Search:
    """candidates: all that should fit, fastest first. plans: of the best of them, compiled."""

    considered: int
    candidates: list[Candidate]
    plans: list[tuple[Candidate, Plan]]
    other: tuple[Candidate, Plan] | None
    """The fastest of those that learn something else (another batch or capacity), compiled."""

    @property
    def winner(self) -> tuple[Candidate, Plan] | None:
        """The compiled one with most tokens per second that fits."""
        fitting = [pair for pair in self.plans if pair[1].fits]
        return max(fitting, key=lambda pair: pair[1].tokens_per_second or 0.0, default=None)

    def as_json(self) -> dict[str, Any]:
        winner = self.winner
        return {
            "considered": self.considered,
            "fitting": len(self.candidates),
            "compiled": [_json(candidate, plan) for candidate, plan in self.plans],
            "other": _json(*self.other) if self.other else None,
            "winner": winner[0].flags if winner else None,
            "because": self.reason(),
        }

    def __str__(self) -> str:
        lines = [f"{self.considered} ways considered, {len(self.candidates)} should fit and learn the same; compiled:"]
        for candidate, plan in self.plans:
            lines.append(_line(candidate, plan))
        lines.append(self.reason())
        if self.other is not None:
            lines.append(f"with another batch or capacity, so that it learns otherwise: {_line(*self.other).strip()}")
        return "\n".join(lines)

    def reason(self) -> str:
        """Why the winner won, against the next best."""
        winner = self.winner
        if winner is None:
            return "nothing fits: use more devices, or a smaller batch or model"
        best, plan = winner
        others = [p for c, p in self.plans if p.fits and c is not best and p.roofline]
        line = plan.roofline
        assert line is not None
        text = f"best: {best.flags}"
        if not others:
            return text
        second = max(others, key=lambda p: p.tokens_per_second or 0.0)
        assert second.roofline is not None
        parts = {
            "computing": second.roofline.compute - line.compute,
            "memory traffic": second.roofline.memory - line.memory,
            "sending": second.roofline.interconnect - line.interconnect,
        }
        part = max(parts, key=lambda name: abs(parts[name]))
        word = "less" if parts[part] > 0 else "more"
        return (
            f"{text}\nwhy: {line.step * 1e3:,.3f} ms a step against {second.roofline.step * 1e3:,.3f} of the next; the "
            f"largest difference is {part}, {abs(parts[part]) * 1e3:,.3f} ms {word}; it is bound by {line.bound}"
        )


def _json(candidate: Candidate, plan: Plan) -> dict[str, Any]:
    return {"flags": candidate.flags, "estimated_step_seconds": candidate.estimate.step_seconds, **plan.as_json()}


def _line(candidate: Candidate, plan: Plan) -> str:
    if not plan.fits:
        return f"  does not fit                       {candidate.flags}"
    peak = (plan.memory["peak"] or 0) / 2**30
    return f"  {plan.tokens_per_second:>12,.0f} tokens/s, {peak:7.2f} GiB  {candidate.flags}"


def search(config: Config, topology: Topology, say: Callable[[str], None] | None = None) -> Search:
    """Rank every mesh, rematerialisation, batch and capacity for training ``config``; compile the best few.

    Ranking is by predicted tokens per second among those whose estimated memory fits. Where a compiled one does not
    fit, those are passed over that should need as much.
    """
    considered, fitting = 0, []
    for candidate in candidates(config, topology):
        considered += 1
        if candidate.estimate.peak <= topology.chip.hbm_bytes:
            fitting.append(candidate)
    fitting.sort(key=lambda candidate: -candidate.estimate.tokens_per_second)
    same = [candidate for candidate in fitting if candidate.learns_the_same]
    others = [candidate for candidate in fitting if not candidate.learns_the_same]
    plans = list(_compiled(same, topology, say, _COMPILED))
    tried = itertools.islice(_compiled(others, topology, say, 1), _OTHERS)
    return Search(considered, same, plans, next((pair for pair in tried if pair[1].fits), None))


def _compiled(
    ranked: Sequence[Candidate], topology: Topology, say: Callable[[str], None] | None, best: int
) -> Iterator[tuple[Candidate, Plan]]:
    """The ``best`` of ``ranked``, and more while none fits."""
    tried, fits, too_much = 0, False, math.inf
    for candidate in ranked:
        if tried >= (best if fits else max(best, _AT_MOST)):
            return
        if candidate.estimate.peak >= too_much:
            continue
        if say:
            say(f"compiling {candidate.flags}")
        try:
            plan, _ = make_plan(candidate.config, topology, "train", Serving(1, 1))
        except jax.errors.JaxRuntimeError as error:  # a compiler's own failure; the others may be well
            print(f"passed over, the compiler failed: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        tried, fits = tried + 1, fits or plan.fits
        if not plan.fits:
            too_much = candidate.estimate.peak
        yield candidate, plan


def candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    """Every combination that the config's rules and the topology allow."""
    capacity = config.model.moe.capacity_factor
    factors = [capacity] if capacity is None else sorted({capacity, *_CAPACITY})
    batches = sorted({max(1, int(config.train.batch_size * share)) for share in _BATCHES})
    train = config.train
    cuts = [(train.batch_size, micro) for micro in sorted({train.accumulation_steps, *_MICRO})]
    cuts += [(batch, train.accumulation_steps) for batch in batches]
    for mesh in meshes(len(topology.devices)):
        for remat, factor, (batch, micro) in itertools.product(_REMAT, factors, cuts):
            changed = _changed(config, mesh, remat, factor, batch, micro)
            if changed and can_lie_on(changed, topology):
                same = (factor, batch) == (capacity, config.train.batch_size)
                yield Candidate(changed, estimate(changed, topology), same)


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Every product of the four axes that gives ``devices``."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            for expert in _divisors(devices // data // fsdp):
                yield MeshConfig(data, fsdp, expert, devices // data // fsdp // expert)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _changed(
    config: Config, mesh: MeshConfig, remat: str, factor: float | None, batch: int, micro: int
) -> Config | None:
    """None where the config's rules refuse it."""
    moe = dataclasses.replace(config.model.moe, capacity_factor=factor)
    model = dataclasses.replace(config.model, remat=remat, moe=moe)  # type: ignore[arg-type]
    train = dataclasses.replace(config.train, batch_size=batch, accumulation_steps=micro)
    try:
        return dataclasses.replace(config, mesh=mesh, model=model, train=train)
    except BadInput:
        return None
