"""Where a run starts: from its newest good checkpoint, or from nothing."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gshardx.checkpoint.manifest import Manifest
from gshardx.checkpoint.restore import restore
from gshardx.checkpoint.store import Items, set_aside
from gshardx.errors import BadInput
from gshardx.models.build import Variables
from gshardx.models.items import items_of as model_items
from gshardx.models.items import variables_of
from gshardx.sharding.distributed import fetch, on_first
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir, holds_a_state
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
        self._found: dict[str, int] = {}

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax on every process; process 0 writes."""
        text = json.dumps(self._rows.get_state(), indent=4)

        async def write() -> None:
            folder: Path = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / _POSITION).write_text, text)

        return write()

    async def load(self, directory: Path) -> Awaitable[None]:
        """Called by Orbax; the rows stay where they are, since the checkpoint may yet turn out to be damaged."""

        async def read() -> None:
            self._found = json.loads(await asyncio.to_thread((directory / _POSITION).read_text))

        return read()

    def go_there(self) -> None:
        """Move the rows to the place that was loaded."""
        self._rows.set_state(self._found)


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
    given = run.starts_from_weights

    def wanted(step: int, manifest: Manifest) -> Items:
        _check_facts(job, run, step, manifest, facts)
        return items_of(job.state, rows) if holds_a_state(manifest) else model_items(job.state.variables)

    step, items = restore(run.checkpoints, wanted, say) or (-1, Items())
    on_first(lambda: set_aside(run.checkpoints, after=step))
    if step < 0:
        return _new_state(job, run, given), 0
    if "data" in items:
        say(f"resuming {run.path} from step {step}")
        items["data"].go_there()
    else:
        say(f"starting from the weights in {run.checkpoints / str(step)}")
    return _state_of(items, job, step), step


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
    given = run.starts_from_weights

    def wanted(step: int, manifest: Manifest) -> Items:
        whole = {name: item for name, item in items_of(job.state, rows).items() if name != "data"}
        return whole if holds_a_state(manifest) else model_items(job.state.variables)

    step, items = restore(run.checkpoints, wanted, say, below=spike) or (0, Items())
    on_first(lambda: set_aside(run.checkpoints, after=step))
    found = _state_of(items, job, step) if items else _new_state(job, run, given)
    say(f"back to step {step} without the {spike - step} batches since ({times} of {limit} times)")
    counted = jax.device_put(jnp.int32(times), job.state.rollbacks.sharding)
    return dataclasses.replace(found, rollbacks=counted), step


def _check_facts(job: Job, run: RunDir, step: int, manifest: Manifest, facts: dict[str, Any]) -> None:
    """Raise BadInput if a checkpoint is bound to another text or tokenizer; weights to start from are to none, or to a
    tokenizer."""
    if not holds_a_state(manifest):
        bound = manifest.extra.get("tokenizer")
        if bound not in (None, facts.get("tokenizer")):
            raise BadInput(
                f"run_dir {run.path}: the weights there have another tokenizer than data.tokenizer = "
                f"{job.config.data.tokenizer}; use {run.tokenizer}"
            )
        return
    source = list(job.config.data.mixture) or job.config.data.path
    for name, now in facts.items():
        if manifest.extra.get(name) != now:
            raise BadInput(
                f"run_dir {run.path}: the {name} is not what step {step} was trained with (data: "
                f"{source}); bring the old text back or use another --run_dir"
            )


def _new_state(job: Job, run: RunDir, given: bool) -> TrainState:
    """New weights; ``given``: the run came with some, so that new ones are not what its user wants.

    Raises:
        BadInput: they were given, and are damaged.
    """
    if given:
        raise BadInput(f"run_dir {run.path}: the weights that it came with are damaged; convert them again")
    return job.init_state()


def _state_of(loaded: Items, job: Job, step: int) -> TrainState:
    variables = variables_of(loaded, job.state.variables)
    if "optimizer" not in loaded:
        return job.init_state(variables)
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
