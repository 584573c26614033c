"""The story of a run: hold the directory, read the text, start or resume, step and save, evaluate and tell."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NamedTuple

import jax

from gshardx.checkpoint.store import CheckpointStore
from gshardx.config import Config
from gshardx.data.pipeline import training_rows
from gshardx.data.prefetch import Ahead
from gshardx.errors import BadInput
from gshardx.models.moe import dispatcher_reason
from gshardx.sharding import one_program_at_a_time
from gshardx.sharding.distributed import Largest, exchange, fetch, on_first, together
from gshardx.train.evaluate import bits_per_byte
from gshardx.train.flops import forward_flops_per_token, peak_flops
from gshardx.train.job import Job
from gshardx.train.metrics import Progress, Scalars, Trackers, step_scalars
from gshardx.train.objective import Batch
from gshardx.train.report import report
from gshardx.train.resume import items_of, resume_or_start
from gshardx.train.run_dir import RunDir
from gshardx.train.schedules import schedule
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
    with on_first(run.lock) or nullcontext():
        on_first(lambda: tell_changes(config, run))
        text = together(lambda: read_text(config.data, config.seed))
        if text.skipped:
            say(text.skipped)
        facts = facts_of(run, text)
        job = Job.of(config, text.tokenizer.vocab_size)
        rows = rows_of(job, text)
        state, first = resume_or_start(job, run, rows, facts, say)
        on_first(lambda: run.write_config(config))
        store = CheckpointStore(run.checkpoints, config.checkpoint.every, config.checkpoint.keep, facts)
        try:
            with caught_signals() as caught:
                ended = run_steps(job, run, text, rows, store, state, first, caught)
        finally:
            rows.close()
            store.close()
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
    """Where stepping ended: the saved state, its step, the last evaluation's bits per byte, if there was one, and the
    signal that ended it, or 0."""

    state: TrainState
    step: int
    bits: float | None
    signal: int


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
    """Steps ``first + 1`` to ``train.steps``, or until a signal."""
    config, last, bits = job.config, first, None
    if first >= config.train.steps:
        say(f"{run.path} has reached step {first} of {config.train.steps}; raise --train.steps to go on")
        return Ended(state, first, None, 0)
    say(f"dispatcher {dispatcher_reason(config.model.moe, config.data.sequence_length)}")
    say(f"compiling for mesh {config.mesh}")
    step_program, _ = job.train_step, job.eval_step
    wait = one_program_at_a_time(job.mesh)
    trackers = Trackers(run, first_step=first + 1)
    largest, number = Largest(job.mesh), 0
    with Progress(config.train.steps, first) as progress:
        meter = Meter(job, trackers, progress)
        for last in range(first + 1, config.train.steps + 1):
            batch = next(rows)
            state, metrics = step_program(state, batch)
            if metrics.experts is not None and last % config.train.trace_every == 0:
                tokens = {"tokens": fetch(batch.tokens), "segments": fetch(batch.segments)}
                trackers.trace(last, tokens, fetch(metrics.experts))
            meter.put(last, metrics._replace(experts=None))
            if wait:
                jax.block_until_ready(state)
            ended, number = last == config.train.steps, largest(caught[0] if caught else 0)
            store.check()
            store.save(last, items_of(state, rows), force=ended or number > 0)
            if ended or (config.train.eval_every and last % config.train.eval_every == 0):
                with meter.paused():
                    bits = bits_per_byte(job, job.evaluated(state), text)
                meter.flush({"evaluation/bits_per_byte": bits})
            elif wait:
                meter.flush()
            if number:
                break
        meter.flush()
    trackers.close()
    store.wait()
    if rows.skipped:
        say(f"data: skipped {rows.skipped:,} broken record(s) while training")
    return Ended(state, last, bits, number)


class _Pending(NamedTuple):
    step: int
    metrics: StepMetrics


class Meter:
    """Fetches each step's metrics when the next step is under way, so that logging never keeps the device waiting."""

    def __init__(self, job: Job, trackers: Trackers, progress: Progress) -> None:
        config = job.config
        self._trackers, self._progress, self._config = trackers, progress, config
        self._learning_rate = schedule(config.optimizer, config.train.steps)
        self._flops = forward_flops_per_token(config.model, job.blueprint.vocab, config.data.sequence_length)
        self._peak, source = peak_flops(job.mesh.size)
        say(f"MFU is against {self._peak / 1e12:.3g} TFLOP/s ({source})")
        self._pending: _Pending | None = None
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that belongs to no step."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def put(self, step: int, metrics: StepMetrics) -> None:
        self.flush()
        self._pending = _Pending(step, metrics)

    def flush(self, more: Scalars | None = None) -> None:
        """Write the step that waits, and ``more`` beside it. Its time runs from when the step before it was written."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        fetched = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        rate = float(self._learning_rate(step - 1))
        scalars = step_scalars(fetched, rate, seconds, self._flops, self._peak) | (more or {})
        if more or step % self._config.train.log_every == 0:
            self._trackers.write(step, scalars)
        self._progress.show(step, scalars)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT (Ctrl-C) append their number to the list; a second one acts as it always did."""
    caught: list[int] = []
    before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
