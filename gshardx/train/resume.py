"""Where a run starts: from its newest good checkpoint, or from nothing."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gshardx.checkpoint.manifest import read_manifest
from gshardx.checkpoint.store import Items, load, newest_good_step, set_aside
from gshardx.errors import BadInput
from gshardx.models.build import Variables
from gshardx.models.items import items_of as model_items
from gshardx.models.items import variables_of
from gshardx.sharding.distributed import exchange, fetch, on_first
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir
from gshardx.train.state import TrainState


class Rows(Protocol):
    """Batches that tell where they stand."""

    def get_state(self) -> dict[str, int]:
        """After the batch given last."""

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from there."""


_POSITION = "process_0-of-1.json"  # Grain's own name for one process, so that runs go on with any number of them


class Position:
    """Where ``rows`` stand, as a checkpoint keeps it: one file, since the place counts the rows of all processes."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax on every process; process 0 writes."""
        text = json.dumps(self._rows.get_state(), indent=4)

        async def write() -> None:
            folder: Path = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / _POSITION).write_text, text)

        return write()

    async def load(self, directory: Path) -> Awaitable[None]:
        """Called by Orbax; moves the rows."""

        async def read() -> None:
            self._rows.set_state(json.loads(await asyncio.to_thread((directory / _POSITION).read_text)))

        return read()


def items_of(state: TrainState, rows: Rows) -> Items:
    """A state as a checkpoint keeps it. The step is the checkpoint's own number."""
    averaged = model_items(Variables(state.ema, state.router), averaged=True) if state.ema else {}
    return (
        model_items(state.variables)
        | averaged
        | {
            "optimizer": state.opt_state,
            "rng": {"key": state.rng},
            "balance": {"weight": state.balance_weight},
            "guard": {"skipped": state.skipped, "rollbacks": state.rollbacks},
            "data": Position(rows),
        }
    )


def resume_or_start(
    job: Job, run: RunDir, rows: Rows, facts: dict[str, Any], say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The state to go on from and its step; ``rows`` is moved to the same place.

    Damaged checkpoints later than the one that is used are moved to RUN_DIR/damaged.

    Raises:
        BadInput: the checkpoint was made from other text or by another model.
    """
    step = on_first(lambda: _choose_step(run, say))
    step = int(exchange("-1" if step is None else str(step))[0])
    if step < 0:
        return job.init_state(), 0
    manifest = read_manifest(run.checkpoints / str(step))
    assert manifest is not None
    source = list(job.config.data.mixture) or job.config.data.path
    for name, now in facts.items():
        if manifest.extra.get(name) != now:
            raise BadInput(
                f"run_dir {run.path}: the {name} is not what step {step} was trained with (data: "
                f"{source}); bring the old text back or use another --run_dir"
            )
    say(f"resuming {run.path} from step {step}")
    return _state_of(load(run.checkpoints, step, items_of(job.state, rows)), job, step), step


def go_back(
    job: Job, run: RunDir, rows: Rows, state: TrainState, spike: int, say: Callable[[str], None]
) -> tuple[TrainState, int]:
    """The newest good state before step ``spike`` and its step; ``rows`` go on behind the batches since.

    Later checkpoints are moved to RUN_DIR/damaged. ``state``: of now, whose count of rollbacks goes on.

    Raises:
        BadInput: the run has gone back as often as it may.
    """
    limit, times = job.config.guard.max_rollbacks, int(fetch(state.rollbacks)) + 1
    if times > limit:
        raise BadInput(
            f"step {spike}: the loss spiked, and the run has gone back {limit} time(s) already (guard.max_rollbacks = "
            f"{limit}); lower optimizer.learning_rate, look at the data, or raise guard.spike_factor"
        )
    step = int(exchange(on_first(lambda: str(_choose_step(run, say, below=spike) or 0)) or "")[0])
    if step:
        items = {name: item for name, item in items_of(job.state, rows).items() if name != "data"}
        found = _state_of(load(run.checkpoints, step, items), job, step)
    else:
        found = job.init_state()
    say(f"back to step {step} without the {spike - step} batches since ({times} of {limit} times)")
    counted = jax.device_put(jnp.int32(times), job.state.rollbacks.sharding)
    return dataclasses.replace(found, rollbacks=counted), step


def _state_of(loaded: Items, job: Job, step: int) -> TrainState:
    variables = variables_of(loaded, job.state.variables)
    return TrainState(
        step=jnp.asarray(step, jnp.int32, device=job.state.step.sharding),
        params=variables.params,
        opt_state=loaded["optimizer"],
        rng=loaded["rng"]["key"],
        router=variables.router,
        balance_weight=loaded["balance"]["weight"],
        skipped=loaded["guard"]["skipped"],
        rollbacks=loaded["guard"]["rollbacks"],
        ema=loaded.get("ema", {}),
    )


def _choose_step(run: RunDir, say: Callable[[str], None], below: int | None = None) -> int | None:
    """The newest good step, ``below`` a step; later ones are moved out of the way."""
    step = newest_good_step(run.checkpoints, report=say, below=below)
    set_aside(run.checkpoints, after=-1 if step is None else step)
    return step
