"""The story of a run: hold the directory, read the text, start or resume, step and save, evaluate and tell."""

import signal
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax

from gshardx.checkpoint.lock import hold
from gshardx.checkpoint.store import CheckpointStore
from gshardx.config import Config
from gshardx.data.pipeline import training_rows
from gshardx.data.prefetch import Ahead
from gshardx.errors import BadInput
from gshardx.models.moe import dispatcher_reason
from gshardx.sharding import CompiledStep, one_program_at_a_time
from gshardx.sharding.distributed import Largest, exchange, fetch, on_first, together
from gshardx.train.evaluate import bits_per_byte
from gshardx.train.guard import Guard
from gshardx.train.job import Job
from gshardx.train.meter import Meter
from gshardx.train.metrics import Progress, Trackers
from gshardx.train.nans import first_not_finite
from gshardx.train.objective import Batch
from gshardx.train.report import report
from gshardx.train.resume import go_back, items_of, resume_or_start
from gshardx.train.run_dir import RunDir
from gshardx.train.signals import caught_signals
from gshardx.train.state import TrainState
from gshardx.train.step import StepMetrics
from gshardx.train.text import Text, read_text


def train(config: Config, run: RunDir, command: str) -> int:
    """Train until ``config.train.steps``, from the newest good checkpoint if there is one.

    Args:
        config: the run.
        run: its directory.
        command: what the user typed, to be shown as the command that resumes.

    Returns:
        0, or 128 + the signal's number if SIGTERM or SIGINT ended the run early; its state was saved.

    Raises:
        BadInput: see the parts.
    """
    with on_first(lambda: hold(run.path)) or nullcontext():
        on_first(lambda: tell_changes(config, run))
        text = together(lambda: read_text(config.data, config.seed))
        if text.skipped:
            say(text.skipped)
        facts = facts_of(run, text)
        job = Job.of(config, text.tokenizer.vocab_size)
        rows = rows_of(job, text)
        state, first = resume_or_start(job, run, rows, facts, say)
        on_first(lambda: run.write_config(config))
        try:
            with caught_signals() as caught:
                ended = step_on(job, run, text, rows, facts, state, first, caught)
        finally:
            rows.close()
        if ended.step < config.train.steps:
            say(f"saved step {ended.step} after {signal.Signals(ended.signal).name}; to continue: {command}")
            return 128 + ended.signal
        bits = bits_per_byte(job, job.evaluated(ended.state), text) if ended.bits is None else ended.bits
        report(job, run, text, job.evaluated(ended.state), bits, command, say)
        return 0


def rows_of(job: Job, text: Text) -> Ahead[Batch]:
    """Endless batches on the devices, some of them ahead; each process reads the rows that its devices hold."""
    data = job.config.data
    rows = training_rows(
        text.blocks,
        data.sequence_length,
        job.config.train.batch_size,
        job.rows,
        on_error=data.on_error,
        workers=data.workers,
    )
    return Ahead(rows, job.to_device, data.prefetch)


def tell_changes(config: Config, run: RunDir) -> None:
    """Say what differs from the run's last start.

    Raises:
        BadInput: a change that a run can't take.
    """
    if run.config.exists() and run.has_checkpoints:
        for change in run.check_config(config):
            say(f"changed since the last start: {change}")


def facts_of(run: RunDir, text: Text) -> dict[str, str]:
    """What a checkpoint is bound to: digests of the tokenizer, which is kept, and of the training tokens.

    Raises:
        BadInput: the run has another tokenizer, or processes have read different texts.
    """
    tokenizer = exchange(on_first(lambda: run.keep_tokenizer(text.tokenizer)) or "")[0]
    if len(set(exchange(text.digest))) > 1:
        raise BadInput("data: the processes have read different texts; give each the same files")
    return {"tokenizer": tokenizer, "data": text.digest}


def say(line: str) -> None:
    """Print on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


class Ended(NamedTuple):
    """Where stepping ended: the state, its step, the last evaluation's bits per byte, if there was one, the signal that
    ended it, or 0, and the step whose loss spiked, or 0."""

    state: TrainState
    step: int
    bits: float | None
    signal: int
    spike: int


def step_on(
    job: Job,
    run: RunDir,
    text: Text,
    rows: Ahead[Batch],
    facts: dict[str, str],
    state: TrainState,
    first: int,
    caught: list[int],
) -> Ended:
    """Steps ``first + 1`` to ``train.steps``, or until a signal; back to a checkpoint after each spike of the loss."""
    config = job.config
    if first >= config.train.steps:
        say(f"{run.path} has reached step {first} of {config.train.steps}; raise --train.steps to go on")
        return Ended(state, first, None, 0, 0)
    say(f"dispatcher {dispatcher_reason(config.model.moe, config.data.sequence_length)}")
    say(f"compiling for mesh {config.mesh}")
    steps = (job.train_step, job.eval_step)
    if config.debug.dump_hlo:
        on_first(lambda: dump_hlo(steps, run))
    while True:
        store = CheckpointStore(run.checkpoints, config.checkpoint.every, config.checkpoint.keep, facts)
        try:
            ended = run_steps(job, run, text, rows, store, state, first, caught)
        finally:
            store.close()
        if not ended.spike:
            break
        state, first = go_back(job, run, rows, ended.state, ended.spike, say)
    if rows.skipped:
        say(f"data: skipped {rows.skipped:,} broken record(s) while training")
    return ended


def dump_hlo(steps: Iterable[CompiledStep[..., Any]], run: RunDir) -> None:
    """Write each step to RUN_DIR/hlo, as it was lowered and as XLA optimised it."""
    run.hlo.mkdir(exist_ok=True)
    for step in steps:
        (run.hlo / f"{step.name}.stablehlo.txt").write_text(step.stablehlo)
        (run.hlo / f"{step.name}.optimized.txt").write_text(step.hlo)
    say(f"wrote {run.hlo}")


def run_steps(
    job: Job,
    run: RunDir,
    text: Text,
    rows: Ahead[Batch],
    store: CheckpointStore,
    state: TrainState,
    first: int,
    caught: list[int],
) -> Ended:
    """Steps ``first + 1`` to ``train.steps``, or until a signal or a spike."""
    config, last, bits = job.config, first, None
    wait = one_program_at_a_time(job.mesh) or config.debug.nans
    trackers = Trackers(run, first_step=first + 1)
    guard = Guard(config.guard, int(fetch(state.skipped)), say)
    largest, number = Largest(job.mesh), 0
    with Progress(config.train.steps, first) as progress:
        meter = Meter(job, guard, trackers, progress, say)
        for last in range(first + 1, config.train.steps + 1):
            before, batch = state, next(rows)
            with jax.transfer_guard("disallow"):  # what the step needs is on the devices, or it would wait for the host
                state, metrics = job.train_step(state, batch)
            if metrics.experts is not None and last % config.train.trace_every == 0:
                tokens = {"tokens": fetch(batch.tokens), "segments": fetch(batch.segments)}
                trackers.trace(last, tokens, fetch(metrics.experts))
            meter.put(last, metrics._replace(experts=None), {"data/skipped": float(rows.skipped)})
            if wait:
                jax.block_until_ready(state)
            if config.debug.nans:
                check_finite(job, last, before, batch, metrics)
            ended, number = last == config.train.steps, largest(caught[0] if caught else 0)
            store.check()
            store.save(last, items_of(state, rows), force=ended or number > 0)
            if ended or (config.train.eval_every and last % config.train.eval_every == 0):
                with meter.paused():
                    bits = bits_per_byte(job, job.evaluated(state), text)
                meter.flush({"evaluation/bits_per_byte": bits})
            elif wait:
                meter.flush()
            if number or guard.spike:
                break
        meter.flush()
    trackers.close()
    store.wait()
    return Ended(state, last, bits, number, guard.spike)


def check_finite(job: Job, step: int, before: TrainState, batch: Batch, metrics: StepMetrics) -> None:
    """Raise BadInput that names the first value of ``step`` that is not finite, if its gradients are not."""
    if int(fetch(metrics.skipped)) > int(fetch(before.skipped)):
        found = first_not_finite(job.update, job.mesh, before, batch)
        raise BadInput(f"step {step}: gradients are not finite; the first such value: {found}")
