"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import rich.progress
from jaxtyping import Int
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from gshardx.data.pipeline import Rows
from gshardx.layers.routing.statistics import describe
from gshardx.train.run_dir import RunDir
from gshardx.train.step import StepMetrics
from gshardx.train.trace import write_trace

Scalars = dict[str, float]

PLAIN_LINE_SECONDS = 10.0
"""Without a terminal, at most one line of progress in this time."""


def step_scalars(
    metrics: StepMetrics, learning_rate: float, seconds: float, flops: tuple[float, float], peak: float
) -> Scalars:
    """Names and values of one step's line.

    Args:
        metrics: fetched to the host.
        learning_rate: of this step.
        seconds: that the step took.
        flops: forward FLOPs of a token outside and inside the experts.
        peak: FLOP/s of the devices. Choices that were not kept count no FLOPs.
    """
    layers = describe(metrics.stats)
    tokens, stats = int(metrics.tokens), metrics.stats
    kept = float(np.mean((stats.choices.sum(-1) - stats.dropped.sum(-1)) / np.maximum(stats.tokens, 1)))
    useful = 3 * tokens * (flops[0] + flops[1] * kept / stats.choices.shape[-1])
    scalars = {
        "learning/loss": float(metrics.loss),
        "learning/aux_loss": float(np.mean(metrics.aux_losses["balance"])),
        "learning/grad_norm": float(metrics.grad_norm),
        "guard/skipped_steps": float(metrics.skipped),
        "guard/rollbacks": float(metrics.rollbacks),
        "learning/current_learning_rate": learning_rate,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": tokens / seconds,
        "perf/useful_tflops_per_second": useful / seconds / 1e12,
        "perf/mfu": useful / seconds / peak,
    }
    others = (name for name in metrics.aux_losses if name != "balance")
    scalars |= {f"learning/aux_{name}_loss": float(np.mean(metrics.aux_losses[name])) for name in others}
    layers["balance_weight"] = np.asarray(metrics.balance_weight)
    for name, by_layer in layers.items():
        scalars[f"moe/{name}"] = float(by_layer.max() if name == "largest_logit" else by_layer.mean())
        scalars |= {f"moe/layer_{layer}/{name}": float(value) for layer, value in enumerate(by_layer)}
    return scalars


class Trackers:
    """Writes scalars to metrics.jsonl and TensorBoard, and traces. Their failure is said once and never ends a run."""

    def __init__(self, run: RunDir, first_step: int) -> None:
        """Lines of steps from ``first_step`` on (left by a run that went further than its checkpoint) are dropped."""
        self._active, self._routing = jax.process_index() == 0, run.routing
        if not self._active:
            return
        try:
            _drop_lines_from(run.metrics, first_step)
            self._lines = run.metrics.open("a", encoding="utf-8")
            self._board = _Board(run.tensorboard, first_step)
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._active:
            return
        try:
            line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in scalars.items()}}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            self._board.write(step, scalars)
        except OSError as error:
            self._give_up(error)

    def trace(self, step: int, rows: Rows, experts: Int[np.ndarray, "layer b t k"]) -> None:
        """Write a routing trace."""
        if not self._active:
            return
        try:
            write_trace(self._routing, step, rows, experts)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._active:
            try:
                self._lines.close()
                self._board.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._active = False
        print(f"metrics: can't be written any more ({error.strerror}); the run goes on", flush=True)


class _Board:
    """A TensorBoard event file, written in the caller's thread.

    tensorboardX's SummaryWriter writes in a thread that a full disk ends, after which its queue fills and blocks for
    ever; here the failure is the caller's to see.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        # Tells TensorBoard to forget what an earlier start wrote for this step and later ones.
        self._events.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class Progress:
    """A bar on a terminal, a line now and then elsewhere; process 0 only."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._last_line = -math.inf
        self._bar: rich.progress.Progress | None = None
        if jax.process_index() == 0 and sys.stdout.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
            )
            self._task = self._bar.add_task("train", total=steps, completed=done, text="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        if "evaluation/bits_per_byte" in scalars and step < self._steps:
            self.say(f"step {step}: {scalars['evaluation/bits_per_byte']:.3f} bits per byte of held-out text")
        text = (
            f"loss {scalars['learning/loss']:.3f}  {scalars['perf/tokens_per_second']:,.0f} tokens/s  "
            f"MFU {scalars['perf/mfu']:.0%}  dropped {scalars['moe/drop_fraction']:.1%}  "
            f"load max/mean {scalars['moe/load_max_over_mean']:.2f}"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, text=text.split("  MFU")[0])
        elif jax.process_index() == 0 and (
            time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or step == self._steps
        ):
            self._last_line = time.monotonic()
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif jax.process_index() == 0:
            print(text, flush=True)


def _drop_lines_from(path: Path, first_step: int) -> None:
    """Keep the whole lines of earlier steps; a line cut off by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parsed(line)
        if record is not None and record["step"] < first_step:
            kept.append(line + "\n")
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept), encoding="utf-8")
    scratch.replace(path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
