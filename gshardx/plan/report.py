"""Everything that a plan says about one step on one topology, and how it is found out."""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from gshardx.config import Config
from gshardx.errors import BadInput
from gshardx.models.budget import Step
from gshardx.models.build import Blueprint
from gshardx.models.count import count_parameters
from gshardx.plan.memory import KINDS, by_kind
from gshardx.plan.program import Compiled, Serving, TooLarge, compile_program, model_on
from gshardx.plan.roofline import Roofline, roofline
from gshardx.plan.topology import Topology
from gshardx.sharding import Collective, CompiledStep, build_mesh, totals
from gshardx.train.flops import forward_flops_per_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one topology. Bytes, FLOPs and seconds are of one device; None: unknown because it does not fit.

    Attributes:
        memory: bytes by kind, and ``peak``; where the step does not fit, only what its inputs take and the peak.
        collectives: of one step.
        warnings: what the compiler complained of, such as involuntary full rematerialization.
        mfu_bound: useful FLOPs, as ``perf/mfu`` counts them, over what the devices could do in the predicted time.
    """

    topology: str
    chip: str
    chips: int
    devices: int
    mesh: dict[str, int]
    step: Step
    fits: bool
    hbm_bytes: int
    parameters: int
    active_parameters: int
    moe_layers: int
    memory: dict[str, int | None]
    tokens: int
    flops_per_device: int | None = None
    collectives: list[Collective] | None = None
    roofline: Roofline | None = None
    mfu_bound: float | None = None
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    hlo_instructions: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def predicted_step_seconds(self) -> float | None:
        return self.roofline.step if self.roofline else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together."""
        return self.tokens / self.roofline.step if self.roofline else None

    def as_json(self) -> dict[str, Any]:
        """The same facts as JSON values, collectives added up by operation and axes; the names are stable."""
        facts = dataclasses.asdict(self)
        if self.collectives is not None:
            facts["collectives"] = [dataclasses.asdict(one) for one in totals(self.collectives)]
        facts["program_bytes"] = self.memory.get("program")
        facts["predicted_step_seconds"] = self.predicted_step_seconds
        facts["tokens_per_second"] = self.tokens_per_second
        if self.roofline:
            facts["roofline"]["bound"] = self.roofline.bound
        return facts


def make_plan(config: Config, topology: Topology, step: Step, serving: Serving) -> tuple[Plan, Compiled]:
    """Compile ``step`` of ``config`` for ``topology`` and read everything from what comes out.

    Raises:
        BadInput: the mesh is not as large as the topology, or a dimension does not divide over it.
    """
    mesh = mesh_on(config, topology)
    blueprint = model_on(config, mesh)
    compiled = compile_program(config, mesh, step, serving, topology.chip.hbm_bytes)
    tokens = tokens_of(config, step, serving)
    plan = Plan(
        topology=topology.name,
        chip=topology.chip.name,
        chips=len(topology.devices) // topology.chip.devices_per_chip,
        devices=mesh.size,
        mesh=config.mesh.shape,
        step=step,
        fits=False,
        hbm_bytes=int(topology.chip.hbm_bytes),
        parameters=count_parameters(blueprint),
        active_parameters=count_parameters(blueprint, active=True),
        moe_layers=config.model.moe_layers,
        memory=dict.fromkeys((*KINDS, "peak")),
        tokens=tokens,
        warnings=complaints(compiled.log),
    )
    if isinstance(compiled.step, TooLarge):
        inputs = compiled.inputs.bytes_per_device()
        peak = max(compiled.step.needed, sum(inputs.values()))
        return dataclasses.replace(plan, memory=plan.memory | inputs | {"peak": peak}), compiled
    return _with_facts(plan, compiled, compiled.step, config, topology, blueprint), compiled


def _with_facts(
    plan: Plan,
    compiled: Compiled,
    step: CompiledStep[..., Any],
    config: Config,
    topology: Topology,
    blueprint: Blueprint,
) -> Plan:
    line = roofline(step.program, step.collectives, step.mesh, topology.chip, topology.torus)
    useful = plan.tokens * sum(forward_flops_per_token(config.model, blueprint.vocab, _context(config, plan.step)))
    passes = 3 if plan.step == "train" else 1
    memory = by_kind(step.memory, step.program, compiled.inputs, plan.step)
    return dataclasses.replace(
        plan,
        fits=memory["peak"] <= plan.hbm_bytes,
        memory=dict(memory),
        flops_per_device=step.flops,
        collectives=step.collectives,
        roofline=line,
        mfu_bound=passes * useful / (topology.chip.peak_flops * plan.devices * line.step),
        lower_seconds=step.lower_seconds,
        compile_seconds=step.compile_seconds,
        hlo_instructions=step.hlo_instructions,
    )


def _context(config: Config, step: Step) -> int:
    """Tokens that attention's useful FLOPs are counted over."""
    return config.data.sequence_length if step in ("train", "forward") else 0


def mesh_on(config: Config, topology: Topology) -> Mesh:
    """The mesh of ``config`` over all devices of ``topology``.

    Raises:
        BadInput: their numbers differ.
    """
    wanted, there = config.mesh.size, len(topology.devices)
    if wanted != there:
        raise BadInput(
            f"mesh ({config.mesh}) has {wanted} devices and topology {topology.name} has {there}; "
            f"choose mesh axes whose product is {there}, for example {example_mesh(config, there)}"
        )
    return build_mesh(config.mesh, topology.devices)


def example_mesh(config: Config, devices: int) -> str:
    """Flags of a mesh of ``devices`` devices: experts as far as they divide, the rest on fsdp or data."""
    expert = math.gcd(devices, config.model.moe.num_experts)
    fsdp = math.gcd(devices // expert, config.model.width)
    data = devices // expert // fsdp
    return f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.expert {expert} --mesh.tensor 1"


def tokens_of(config: Config, step: Step, serving: Serving) -> int:
    """Tokens that one step takes in, over all devices."""
    if step in ("train", "forward"):
        return config.train.batch_size * config.data.sequence_length
    return serving.rows * (serving.chunk if step == "prefill" else 1)


def complaints(log: str) -> tuple[str, ...]:
    """Lines of the compiler's log that tell of communication nobody asked for."""
    return tuple(line.strip() for line in log.splitlines() if "nvoluntary full rematerialization" in line)
