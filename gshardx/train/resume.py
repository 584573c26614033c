"""Where a run starts: from its newest good checkpoint, or from nothing."""

from collections.abc import Callable
from typing import Any

import grain
import jax.numpy as jnp

from gshardx.checkpoint.manifest import read_manifest
from gshardx.checkpoint.store import Items, load, newest_good_step, set_aside
from gshardx.data.pipeline import Rows
from gshardx.errors import BadInput
from gshardx.models.items import items_of as model_items
from gshardx.models.items import variables_of
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir
from gshardx.train.state import TrainState, init_state


def items_of(state: TrainState, rows: grain.DatasetIterator[Rows]) -> Items:
    """A state as a checkpoint keeps it. The step is the checkpoint's own number."""
    return model_items(state.variables) | {
        "optimizer": state.opt_state,
        "rng": {"key": state.rng},
        "balance": {"weight": state.balance_weight},
        "data": rows,
    }


def resume_or_start(
    job: Job, run: RunDir, rows: grain.DatasetIterator[Rows], facts: dict[str, Any], say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The state to go on from and its step; ``rows`` is moved to the same place.

    Damaged checkpoints later than the one that is used are moved to RUN_DIR/damaged.

    Raises:
        BadInput: the checkpoint was made from other text or by another model.
    """
    step = newest_good_step(run.checkpoints, report=say)
    set_aside(run.checkpoints, after=-1 if step is None else step)
    if step is None:
        return init_state(job.blueprint, job.optimizer, job.config.seed, job.mesh), 0
    manifest = read_manifest(run.checkpoints / str(step))
    assert manifest is not None
    for name, now in facts.items():
        if manifest.extra.get(name) != now:
            raise BadInput(
                f"run_dir {run.path}: the {name} is not what step {step} was trained with (data.path = "
                f"{job.config.data.path}); bring the old text back or use another --run_dir"
            )
    loaded = load(run.checkpoints, step, items_of(job.state, rows))
    variables = variables_of(loaded, job.state.variables)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32, device=job.state.step.sharding),
        params=variables.params,
        opt_state=loaded["optimizer"],
        rng=loaded["rng"]["key"],
        router=variables.router,
        balance_weight=loaded["balance"]["weight"],
    )
    say(f"resuming {run.path} from step {step}")
    return state, step
