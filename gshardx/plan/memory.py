"""Where a step's memory goes, by kind, from what XLA allocated."""

from gshardx.models.budget import Step
from gshardx.plan.program import Inputs
from gshardx.sharding import Memory, bytes_per_device
from gshardx.sharding.hlo import Computation, Instruction, Program

KINDS = ("parameters", "optimizer", "gradients", "activations", "temporaries", "kv_cache", "inputs", "program")


def by_kind(memory: Memory, program: Program, inputs: Inputs, step: Step) -> dict[str, int]:
    """Bytes of one device; the kinds of ``KINDS`` add up to ``peak``.

    XLA allocates temporaries as one heap and says only its size. Of it, gradients take what the parameters take, or
    their part over fsdp in ZeRO-2 (they are all alive when the optimizer starts), and activations what the forward
    loops stack up for the backward ones; what is left is called temporaries. ``inputs`` are batch, counters and outputs
    that reuse no argument.
    """
    kinds = inputs.bytes_per_device()
    heap = memory.temporaries
    gradients = min(bytes_per_device(inputs.gradients), heap)
    activations = min(saved_activations(program), heap - gradients) if step == "train" else 0
    kinds |= {"gradients": gradients, "activations": activations, "temporaries": heap - gradients - activations}
    kinds["program"] = memory.program
    kinds["inputs"] = memory.peak - sum(kinds.values())
    return {kind: kinds[kind] for kind in KINDS} | {"peak": memory.peak}


def saved_activations(program: Program) -> int:
    """Bytes of what loops of the forward pass store a slice a turn: the residuals of scanned layers."""
    saved = 0
    for loop, _, times in program.executed():
        if loop.op == "while" and "transpose(" not in loop.op_name and times == 1:
            turns = program.trip_count(loop)
            saved += sum(
                shape.bytes
                for at, shape in enumerate(loop.shapes)
                if shape.dims[:1] == (turns,) and _changes(program.computations[_body(loop)], at)
            )
    return saved


def _body(loop: Instruction) -> str:
    return loop.find(r"body=%?([\w.\-]+)") or ""


def _changes(body: Computation, index: int) -> bool:
    """Whether the loop's body gives another value for element ``index`` of what it carries than it got."""
    root = next(one for one in body.values() if one.root)
    if root.op != "tuple":
        return True
    returned = body.get(root.operands[index])
    while returned is not None and returned.op in ("copy", "bitcast"):
        returned = body.get(returned.operands[0])
    passed_on = returned is not None and returned.op == "get-tuple-element"
    return not (passed_on and returned is not None and returned.find(r"index=(\d+)") == str(index))
