"""The step that a plan compiles, for devices that need not exist, and what it is given."""

import dataclasses
import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from gshardx.config import Config
from gshardx.data.sources import known_tokenizer
from gshardx.data.tokenizer import build_tokenizer
from gshardx.models import decode
from gshardx.models.budget import Step
from gshardx.models.build import Blueprint, blueprint, rows_of_vocabulary
from gshardx.models.generator import compile_decode, compile_prefill
from gshardx.sharding import CompiledStep, bytes_per_device
from gshardx.train.job import Job

STEPS: tuple[Step, ...] = get_args(Step)


@dataclasses.dataclass(frozen=True)
class Serving:
    """Of prefill and decode: rows in a batch, tokens that a row's cache holds, prompt tokens a call."""

    rows: int
    length: int
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Abstract arrays that a step reads, by kind, and the ``gradients`` that it makes inside."""

    parameters: Any
    optimizer: Any = ()
    kv_cache: Any = ()
    gradients: Any = ()

    def bytes_per_device(self) -> dict[str, int]:
        """Of what it reads."""
        kinds = {"parameters": self.parameters, "optimizer": self.optimizer, "kv_cache": self.kv_cache}
        return {kind: bytes_per_device(tree) for kind, tree in kinds.items()}


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """XLA refused a step for its memory; ``needed``: bytes of a device, as it said."""

    needed: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling came to, and what the compiler wrote to its log meanwhile."""

    step: CompiledStep[..., Any] | TooLarge
    inputs: Inputs
    log: str


def vocabulary(config: Config) -> int:
    """Rows of the model's embedding, without reading the training text.

    Raises:
        BadInput: the tokenizer's file can't be read.
    """
    return rows_of_vocabulary(config.model, _vocabulary(known_tokenizer(config.data), config.data.vocab_size))


@functools.cache  # a search asks thousands of times
def _vocabulary(tokenizer: str, vocab_size: int) -> int:
    return vocab_size if tokenizer == "bpe" else build_tokenizer(tokenizer, 0, []).vocab_size


def model_on(config: Config, mesh: Mesh) -> Blueprint:
    """The model of ``config`` with its parameters placed on ``mesh``."""
    return blueprint(config.model, vocabulary(config), mesh)


def compile_program(config: Config, mesh: Mesh, step: Step, serving: Serving, available: float) -> Compiled:
    """Compile one step of ``config`` for devices of ``available`` bytes each; no parameter gets a value."""
    plan = model_on(config, mesh)
    inputs = _inputs(config, plan, mesh, step, serving)
    program: CompiledStep[..., Any] | TooLarge
    with _captured_log() as log:
        try:
            program = _compile(config, plan, mesh, step, serving)
        except jax.errors.JaxRuntimeError as error:
            refusal = too_large(str(error))
            needed = sum(inputs.bytes_per_device().values())
            if refusal is None and needed > available:  # libtpu then fails anyhow: "Invalid TPU program"
                refusal = TooLarge(needed)
            if refusal is None:
                raise
            program = refusal
    return Compiled(program, inputs, log())


def _compile(config: Config, plan: Blueprint, mesh: Mesh, step: Step, serving: Serving) -> CompiledStep[..., Any]:
    if step == "train":
        return Job.of(config, plan.vocab, mesh).train_step
    if step == "forward":
        return Job.of(config, plan.vocab, mesh).eval_step
    if step == "prefill":
        return compile_prefill(plan, mesh, length=serving.length, rows=serving.rows, chunk=serving.chunk)
    return compile_decode(plan, mesh, length=serving.length, rows=serving.rows)


def _inputs(config: Config, plan: Blueprint, mesh: Mesh, step: Step, serving: Serving) -> Inputs:
    if step in ("train", "forward"):
        job = Job.of(config, plan.vocab, mesh)
        if step == "forward":
            return Inputs(job.blueprint.params)
        gradients = job.split if config.train.zero_stage == 2 else job.blueprint.params
        return Inputs(job.blueprint.params, optimizer=(job.state.opt_state, job.state.ema), gradients=gradients)
    state = decode.abstract_state(plan, serving.rows, serving.length, mesh)
    return Inputs(plan.params, kv_cache=(state.k, state.v))


def too_large(message: str) -> TooLarge | None:
    """Read XLA's complaint that a program, or one array of it, needs more memory than a device has.

    As libtpu 0.0.42 and 0.0.50 say it, and as older ones do. None: it complains of something else.
    """
    size = r"([\d.]+)([KMGT]?)"
    patterns = (
        rf"\({size}i?B?\) exceeds available HBM",
        rf"Used {size}i?B? of \S+ hbm",
        rf"Allocation \(size={size}\) would exceed memory \(size=\d+\) :: .*hbm",
    )
    found = next((match for pattern in patterns if (match := re.search(pattern, message))), None)
    if found is None:
        return None
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return TooLarge(int(float(found.group(1)) * scale[found.group(2)]))


@contextmanager
def _captured_log() -> Iterator[Any]:
    """Keep what C++ writes to standard error; the value is a function that gives it afterwards.

    An exception that leaves the block takes it to the terminal.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        text: list[str] = []

        def restore() -> None:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))

        try:
            yield lambda: text[0]
        except BaseException:
            restore()
            print(text[0], end="", file=sys.stderr, flush=True)
            raise
        else:
            restore()
