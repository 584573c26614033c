"""``gshardx.infer batch``: many prompts from a file to a file, through the engine, in order, restartable.

A line of the input is a JSON object: ``prompt``, and if wanted ``id`` and any of the sampling settings of
:class:`gshardx.infer.request.SamplingParams`. The line of the output in the same place has ``id`` (or the line's
number), ``choices`` with ``text``, ``finish_reason`` and, if asked for, ``logprobs``, and ``usage``; or ``error``.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from gshardx.data.progress import Bar
from gshardx.errors import BadInput
from gshardx.infer.answers import Answer, Answers
from gshardx.infer.engine import Engine
from gshardx.infer.load import load_run
from gshardx.infer.options import add_model_flags, add_sampling_flags, engine_of, mesh_of, sampling_of
from gshardx.infer.request import Request, SamplingParams

AHEAD = 8
"""Requests for each sequence at a time that are read before the first of them is written: enough to fill every slot
while a long one is waited for."""


class Line(NamedTuple):
    """A line of the input."""

    number: int
    """From 1."""
    size: int
    """In bytes."""
    id: Any
    prompt: str
    params: SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="in.jsonl", help='one {"prompt": ...} a line')
    parser.add_argument("output", type=Path, metavar="out.jsonl", help="answers, one a line; continued if it is there")
    add_sampling_flags(parser)
    add_model_flags(parser)


def batch(arguments: argparse.Namespace) -> int:
    """Answer every line that the output does not hold yet; print how many there are.

    Raises:
        BadInput: a file that can't be read or written, a line that is no request, or an output of other requests.
    """
    lines = partial(_lines, arguments.input, sampling_of(arguments))
    total = sum(1 for _ in lines())
    if total == 0:
        raise BadInput(f"{arguments.input}: no lines in it; write one JSON object a line")
    done = _done(arguments.output, lines())
    if done == total:
        print(f"{arguments.output}: all {total:,} answers are there")
        return 0
    run = load_run(arguments.run, mesh_of(arguments))
    engine = engine_of(arguments, run, total - done, arguments.max_new_tokens)
    failed = 0
    with arguments.output.open("a", encoding="utf-8") as out, Bar("answers", arguments.input.stat().st_size) as bar:
        bar.advance(sum(line.size for line in itertools.islice(lines(), done)))
        for line, said in _answered(engine, itertools.islice(lines(), done, None), AHEAD * arguments.batch_size):
            failed += "error" in said
            out.write(json.dumps(said, ensure_ascii=False) + "\n")
            out.flush()
            bar.advance(line.size)
    stats = engine.stats
    print(
        f"{arguments.output}: {total - done:,} answers, {failed:,} of them errors; {stats.drawn_tokens:,} tokens; "
        f"{stats.cached_tokens:,} of {stats.prompt_tokens:,} prompt tokens were in the cache; {stats.tokens:,} of "
        f"{stats.padded_tokens:,} computed ones were real"
    )
    return 0


def _answered(engine: Engine, lines: Iterator[Line], ahead: int) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line with its answer, in order; at most ``ahead`` lines are held."""
    held: dict[int, Line] = {}
    choices: dict[int, list[Answer]] = {}
    said: dict[int, dict[str, Any]] = {}

    def read() -> None:
        for line in itertools.islice(lines, ahead - len(held)):
            held[line.number] = line
            try:
                engine.submit(Request(str(line.number), engine.tokenizer.encode(line.prompt), line.params))
            except BadInput as error:
                said[line.number] = {"id": line.id, "error": str(error)}

    answers = Answers()
    while True:
        read()
        if not held:
            return
        for answer in answers.finished(engine.step()):
            line = held[int(answer.id)]
            mine = choices.setdefault(line.number, [])
            mine.append(answer)
            if len(mine) == line.params.n:
                said[line.number] = _told(line, choices.pop(line.number))
        while held and (first := min(held)) in said:
            yield held.pop(first), said.pop(first)


def _told(line: Line, choices: list[Answer]) -> dict[str, Any]:
    errors = [answer.error for answer in choices if answer.error]
    if errors:
        return {"id": line.id, "error": errors[0]}
    return {
        "id": line.id,
        "choices": [
            {"text": one.text, "finish_reason": one.finish_reason}
            | ({"logprobs": [logprob._asdict() for logprob in one.logprobs]} if one.logprobs else {})
            for one in sorted(choices, key=lambda one: one.choice)
        ],
        "usage": {"completion_tokens": sum(len(one.tokens) for one in choices)},
    }


def _lines(path: Path, defaults: SamplingParams) -> Iterator[Line]:
    """Read and check each; a setting that a line lacks is the default."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield _line(raw, number, defaults, f"{path}, line {number}")
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error


def _line(raw: bytes, number: int, defaults: SamplingParams, where: str) -> Line:
    try:
        found = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadInput(f"{where}: not JSON ({error}); write one object a line") from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise BadInput(f'{where}: no text under "prompt"; write {{"prompt": "..."}}')
    prompt, own_id = found.pop("prompt"), found.pop("id", number)
    try:
        params = dataclasses.replace(defaults, **{name: _setting(name, value) for name, value in found.items()})
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    return Line(number, len(raw), own_id, prompt, params)


_KINDS = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(SamplingParams).items()}


def _setting(name: str, value: Any) -> Any:
    """A value from JSON as :class:`SamplingParams` has it."""
    if name not in _KINDS:
        nearest = difflib.get_close_matches(name, ["prompt", "id", *_KINDS], n=1, cutoff=0.0)[0]
        raise BadInput(f"unknown key {name}; did you mean {nearest}?")
    kinds = _KINDS[name]
    try:
        if name == "logit_bias":
            return {int(token): float(bias) for token, bias in value.items()}
        if name in ("stop", "stop_tokens"):
            assert all(type(one) is kinds[0] for one in value)
            return tuple(value)
        assert type(value) in kinds or (type(value) is int and float in kinds)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"{name} = {json.dumps(value)}: of another type; see --help") from error
    return value


def _done(output: Path, lines: Iterator[Line]) -> int:
    """Answers that an earlier call wrote whole; what it left of another is removed.

    Raises:
        BadInput: they are other requests' answers.
    """
    if not output.exists():
        return 0
    whole = done = 0
    with output.open("r+b") as file:
        for raw in file:
            said = _whole(raw)
            if said is None:
                break
            line = next(lines, None)
            if line is None or not isinstance(said, dict) or said.get("id") != line.id:
                raise BadInput(f"{output}, line {done + 1}: answers another request; give another output")
            whole, done = whole + len(raw), done + 1
        file.truncate(whole)
    return done


def _whole(raw: bytes) -> Any:
    """What a line says; None for one that was not written to its end."""
    try:
        return json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
