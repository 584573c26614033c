"""The story of a run: hold the directory, read the text, start or resume, step, evaluate, save, and tell."""

import signal
from contextlib import nullcontext

import jax

from gshardx.config import Config
from gshardx.data.pipeline import training_rows
from gshardx.data.prefetch import Ahead
from gshardx.errors import BadInput
from gshardx.lock import hold
from gshardx.models.build import rows_of_vocabulary
from gshardx.sharding.distributed import exchange, on_first, together
from gshardx.sharding.peers import Peers
from gshardx.train.evaluate import evaluate
from gshardx.train.events import Events
from gshardx.train.goodput import Goodput
from gshardx.train.job import Job
from gshardx.train.objective import Batch
from gshardx.train.report import report
from gshardx.train.resume import resume_or_start
from gshardx.train.run_dir import RunDir
from gshardx.train.session import Session, say
from gshardx.train.signals import caught_signals
from gshardx.train.stepping import step_on
from gshardx.train.text import Text, read_text
from gshardx.train.trackers import check_trackers
from gshardx.train.versions import about_start
from gshardx.train.watchdog import Watchdog


def train(config: Config, run: RunDir, command: str, peers: Peers | None = None) -> int:
    """Train until ``config.train.steps``, from the newest good checkpoint if there is one.

    Args:
        config: the run.
        run: its directory.
        command: what the user typed, to be shown as the command that resumes.
        peers: the other processes.

    Returns:
        0, or 128 + the signal's number if SIGTERM or SIGINT ended the run early; its state was saved.

    Raises:
        BadInput: see the parts.
    """
    with on_first(lambda: hold(run.path, "--run_dir", "trains in it")) or nullcontext():
        on_first(lambda: check_trackers(config.tracking))
        on_first(lambda: tell_changes(config, run))
        speaks, peers = jax.process_index() == 0, peers or Peers()
        goodput = Goodput(run.goodput if speaks else None, run.metrics)
        events = Events(run.events if speaks else None)

        def farewell(line: str) -> None:
            events.tell("lost_peer", line)
            goodput.write(ended=True)

        peers.farewell = farewell
        text = together(lambda: read_text(config.data, config.seed))
        if text.skipped:
            say(text.skipped)
        facts = facts_of(run, text)
        job = Job.of(config, rows_of_vocabulary(config.model, text.tokenizer.vocab_size))
        rows = rows_of(job, text)
        try:
            with Watchdog(config.watchdog, goodput, events, peers) as watchdog, caught_signals() as caught:
                return follow(Session(job, run, text, rows, facts, caught, goodput, events, watchdog), command)
        except BadInput as error:
            events.tell("end", f"error: {error}")
            raise
        finally:
            rows.close()
            goodput.write(ended=True)


def follow(session: Session, command: str) -> int:
    """Start or resume, step, and tell how it went; the exit code."""
    job, run, goodput = session.job, session.run, session.goodput
    with goodput.spending("restore" if run.has_checkpoints else "init"):
        state, first = resume_or_start(job, run, session.rows, session.facts, say)
        goodput.back_to(first)
    session.events.step = first
    if goodput.killed:
        session.events.tell("killed", "the start before this one ended without a word")
    session.events.tell("start", f"from step {first}", **about_start(job.mesh, command))
    on_first(lambda: run.write_config(job.config))
    ended = step_on(session, state, first)
    goodput.saved(ended.step)
    if ended.step < job.config.train.steps:
        line = f"saved step {ended.step} after {signal.Signals(ended.signal).name}"
        session.events.tell("signal", line)
        say(f"{line}; to continue: {command}")
        return 128 + ended.signal
    with goodput.spending("evaluation"):
        scores = ended.scores or evaluate(job, job.evaluated(ended.state), session.text)
        report(job, run, session.text, job.evaluated(ended.state), scores, command, goodput, say)
    goodput.saved(ended.step)
    session.events.tell("end", f"done: step {ended.step}")
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
