"""Finding the operation that first made a value that is not finite."""

import traceback
from pathlib import Path

import jax
from jax.sharding import Mesh

from gshardx.train.objective import Batch
from gshardx.train.state import TrainState
from gshardx.train.step import TrainStep

_PACKAGE = Path(__file__).parent.parent


def first_not_finite(step: TrainStep, mesh: Mesh, state: TrainState, batch: Batch) -> str:
    """Where in a step's gradient the first NaN or infinity arises: operation, file and line.

    Repeats the step without compiling it, so it takes minutes on a large model.
    """
    with jax.set_mesh(mesh), jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
        try:
            step.gradient(state, batch)
        except FloatingPointError as error:
            return f"{_operation(error)}{_place(error)}"
    return "none when the step is repeated operation by operation: it comes from the compiled program alone"


def _operation(error: FloatingPointError) -> str:
    return str(error).splitlines()[0]


def _place(error: FloatingPointError) -> str:
    """The innermost line of this package."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    if not frames:
        return ""
    last = frames[-1]
    return f", at {Path(last.filename).relative_to(_PACKAGE.parent)}:{last.lineno} in {last.name}: {last.line}"
