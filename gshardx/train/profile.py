"""Traces of some steps for xprof."""

import contextlib
from pathlib import Path

import jax

from gshardx.config import ProfileConfig


class Profile:
    """Starts a trace before the step where it begins and ends it after its last; a context, so that none stays open.

    On process 0 only: a trace's file is named after its host, and processes of one host would overwrite each other's. A
    trace that fails ends no run.
    """

    def __init__(self, config: ProfileConfig, folder: Path) -> None:
        self._folder, self._running = folder, False
        self._first = config.start if config.start is not None and jax.process_index() == 0 else 0
        self._last = self._first + config.steps - 1
        self._step = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            print(self._stop("as far as it went"), flush=True)

    def before(self, step: int) -> None:
        if step == self._first:
            try:
                jax.profiler.start_trace(str(self._folder))
                self._running = True
            except RuntimeError as error:
                print(_failed(error), flush=True)
        if self._running:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def after(self, step: int, result: object) -> str:
        """``result``: of the step, waited for at the trace's end. What to tell the user, or nothing."""
        if not self._running:
            return ""
        if step == self._last:
            jax.block_until_ready(result)
            return self._stop(f"to {step}")
        self._step.close()
        return ""

    def _stop(self, until: str) -> str:
        self._running = False
        self._step.close()
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            return _failed(error)
        return f"wrote a trace of steps {self._first} {until}; look (pip install xprof): xprof --logdir {self._folder}"


def _failed(error: RuntimeError) -> str:
    return f"profile: can't be written ({error}); the run goes on"
