"""The steps of a run, and what happens between them: traces, evaluations, saves, rollbacks."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from gshardx.checkpoint.store import CheckpointStore
from gshardx.config import Config
from gshardx.errors import BadInput
from gshardx.models.moe import dispatcher_reason
from gshardx.sharding import CompiledStep, one_program_at_a_time
from gshardx.sharding.distributed import Largest, fetch, on_first
from gshardx.train.evaluate import evaluate
from gshardx.train.guard import Guard
from gshardx.train.job import Job
from gshardx.train.meter import Meter
from gshardx.train.metrics import Scalars
from gshardx.train.nans import first_not_finite
from gshardx.train.objective import Batch
from gshardx.train.profile import Profile
from gshardx.train.progress import Progress
from gshardx.train.resume import go_back
from gshardx.train.run_dir import RunDir
from gshardx.train.saver import Saver, Wish
from gshardx.train.session import Session, say
from gshardx.train.state import TrainState
from gshardx.train.step import StepMetrics
from gshardx.train.trackers import Trackers


class Ended(NamedTuple):
    """Where stepping ended: the state, its step, the last evaluation's scores, the signal that ended it, or 0, and the
    step whose loss spiked, or 0."""

    state: TrainState
    step: int
    scores: Scalars
    signal: int
    spike: int


def step_on(session: Session, state: TrainState, first: int) -> Ended:
    """Steps ``first + 1`` to ``train.steps``, or until a signal; back to a checkpoint after each spike of the loss."""
    job, run, config, goodput = session.job, session.run, session.job.config, session.goodput
    if first >= config.train.steps:
        say(f"{run.path} has reached step {first} of {config.train.steps}; raise --train.steps to go on")
        return Ended(state, first, {}, 0, 0)
    say(f"dispatcher {dispatcher_reason(config.model.moe, config.data.sequence_length)}")
    say(f"compiling for mesh {config.mesh}")
    with goodput.spending("compile"):
        steps = (job.train_step, job.eval_step)
    if config.debug.dump_hlo:
        on_first(lambda: dump_hlo(steps, run))
    policy = config.checkpoint
    while True:
        store = CheckpointStore(
            run.checkpoints, policy.every, policy.keep, session.facts,
            keep_every=policy.keep_every, keep_best=policy.keep_best,
        )  # fmt: skip
        try:
            ended = run_steps(session, store, state, first)
        finally:
            store.close()
        if not ended.spike:
            break
        with goodput.spending("restore"):
            state, first = go_back(
                job, run, session.rows, ended.state, ended.spike, lambda line: session.say("rollback", line)
            )
            goodput.back_to(first)
    if session.rows.skipped:
        say(f"data: skipped {session.rows.skipped:,} broken record(s) while training")
    return ended


def dump_hlo(steps: Iterable[CompiledStep[..., Any]], run: RunDir) -> None:
    """Write each step to RUN_DIR/hlo, as it was lowered and as XLA optimised it."""
    run.hlo.mkdir(exist_ok=True)
    for step in steps:
        (run.hlo / f"{step.name}.stablehlo.txt").write_text(step.stablehlo)
        (run.hlo / f"{step.name}.optimized.txt").write_text(step.hlo)
    say(f"wrote {run.hlo}")


def run_steps(session: Session, store: CheckpointStore, state: TrainState, first: int) -> Ended:
    """Steps ``first + 1`` to ``train.steps``, or until a signal or a spike."""
    job, config, goodput, rows = session.job, session.job.config, session.goodput, session.rows
    last, scores, wish = first, Scalars(), Wish()
    wait = one_program_at_a_time(job.mesh) or config.debug.nans
    trackers = Trackers(session.run, config, first_step=first + 1)
    guard = Guard(config.guard, int(fetch(state.skipped)), lambda line: session.say("guard", line))
    agree = Largest(job.mesh)
    saver = Saver(config.checkpoint, store, goodput, lambda line: session.say("save_failed", line))
    with Progress(config.train.steps, first) as progress, Profile(config.profile, session.run.profile) as profile:
        meter = Meter(job, guard, trackers, progress, goodput, say)
        goodput.enter("step")
        for last in range(first + 1, config.train.steps + 1):
            session.events.step = last
            profile.before(last)
            with goodput.spending("data_wait"):
                before, batch = state, next(rows)
            with jax.transfer_guard("disallow"):  # what the step needs is on the devices, or it would wait for the host
                state, metrics = job.train_step(state, batch)
            trace(config, trackers, last, batch, metrics)
            meter.put(last, metrics._replace(experts=None), {"data/skipped": float(rows.skipped)})
            if wait:
                jax.block_until_ready(state)
            if config.debug.nans:
                check_finite(job, last, before, batch, metrics)
            if line := profile.after(last, state):
                say(line)
            wish = Wish(agree(Wish.of(session.caught, saver.due)))
            scores = evaluated(session, meter, last, state)
            if wait or scores:
                meter.flush(scores)
            saved(session, saver, meter, last, state, scores, wish)
            session.watchdog.step(last)
            if wish.signal or guard.spike:
                break
        meter.flush()
    with goodput.spending("checkpoint_stall"):
        store.wait()
    goodput.enter("init")
    trackers.close()
    return Ended(state, last, scores, wish.signal, guard.spike)


def trace(config: Config, trackers: Trackers, step: int, batch: Batch, metrics: StepMetrics) -> None:
    """Write where each token of ``batch`` went, if it is due."""
    if metrics.experts is not None and step % config.train.trace_every == 0:
        tokens = {"tokens": fetch(batch.tokens), "segments": fetch(batch.segments)}
        trackers.trace(step, tokens, fetch(metrics.experts))


def evaluated(session: Session, meter: Meter, step: int, state: TrainState) -> Scalars:
    """Scores on held-out text; none if no evaluation is due."""
    train = session.job.config.train
    if step < train.steps and not (train.eval_every and step % train.eval_every == 0):
        return Scalars()
    jax.block_until_ready(state)  # or the evaluation would be charged with the step
    with meter.paused(), session.goodput.spending("evaluation"):
        return evaluate(session.job, session.job.evaluated(state), session.text)


def saved(
    session: Session, saver: Saver, meter: Meter, step: int, state: TrainState, scores: Scalars, wish: Wish
) -> None:
    """Start a save if one is wanted; otherwise see how the one in flight fares."""
    last = step == session.job.config.train.steps or wish.signal > 0
    if not saver.wants(step, scores, wish, last=last):
        saver.check()
        return
    jax.block_until_ready(state)
    with meter.paused(), session.goodput.spending("checkpoint_stall"):
        saver.save(step, state, session.rows, scores, last=last)


def check_finite(job: Job, step: int, before: TrainState, batch: Batch, metrics: StepMetrics) -> None:
    """Raise BadInput that names the first value of ``step`` that is not finite, if its gradients are not."""
    if int(fetch(metrics.skipped)) > int(fetch(before.skipped)):
        found = first_not_finite(job.update, job.mesh, before, batch)
        raise BadInput(f"step {step}: gradients are not finite; the first such value: {found}")
