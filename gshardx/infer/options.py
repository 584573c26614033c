"""Flags that the commands of ``python -m gshardx.infer`` share."""

import argparse
from pathlib import Path

from gshardx.errors import BadInput
from gshardx.infer.engine import Engine
from gshardx.infer.load import LoadedRun
from gshardx.infer.quantize import WEIGHTS
from gshardx.infer.request import SamplingParams
from gshardx.infer.settings import ATTENTION, DRAFTS, KV_DTYPES, EngineConfig
from gshardx.sharding import MeshConfig


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and how much of it at once."""
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR", help="a run of gshardx.train")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at a time (default %(default)s)")
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="room for prompt and text, tokens (default: trained sequence + max_new_tokens, if there is such a flag)",
    )
    for name, values, said in (
        ("weights", WEIGHTS, "store large matrices so (default: as trained)"),
        ("kv_dtype", KV_DTYPES, "store keys and values so (default: the model's)"),
        ("attention", ATTENTION, "read them by a loop that runs anywhere, or by JAX's kernels (default: xla)"),
        ("drafts", DRAFTS, "who guesses tokens ahead, where that is faster; changes no text (default: nobody)"),
    ):
        parser.add_argument(f"--{name}", choices=values, help=said)
    for axis in MeshConfig().shape:
        parser.add_argument(f"--mesh.{axis}", dest=f"mesh_{axis}", type=int, default=1, metavar="N")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How to continue a prompt."""
    given = SamplingParams()
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="tokens to add (default 100)")
    for name, kind, said in (
        ("temperature", float, "0 takes the best token (default 1.0)"),
        ("top_k", int, "draw from the k best tokens; 0: from all (default 0)"),
        ("top_p", float, "draw from the best tokens of this probability together"),
        ("min_p", float, "draw from tokens of at least this share of the best one's probability"),
        ("repetition_penalty", float, "divides logits of tokens that prompt or text hold (default 1.0: none)"),
        ("presence_penalty", float, "subtracted from logits of tokens that the text holds"),
        ("frequency_penalty", float, "the same for each time that it does"),
        ("seed", int, "of the draws; the same for each prompt (default 0)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(given, name), help=said)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    """Raises:
    BadInput: a value out of its range.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "seed")  # fmt: skip
    try:
        return SamplingParams(**{name: getattr(arguments, name) for name in names}, stop=tuple(arguments.stop))
    except BadInput as error:
        raise BadInput(f"--{error}") from error


def mesh_of(arguments: argparse.Namespace) -> MeshConfig:
    return MeshConfig(**{axis: getattr(arguments, f"mesh_{axis}") for axis in MeshConfig().shape})


def engine_of(
    arguments: argparse.Namespace, run: LoadedRun, sequences: int, added: int, ahead_ms: float | None = None
) -> Engine:
    """An engine for at most ``sequences`` at once, ``added`` tokens longer than was trained unless a flag says so.

    Raises:
        BadInput: a size that can't be.
    """
    for name in ("batch_size", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    shards = mesh_of(arguments).batch_shards
    config = EngineConfig(
        slots=-(-min(arguments.batch_size, sequences) // shards),
        max_length=arguments.max_length or run.config.data.sequence_length + added,
        ahead_ms=ahead_ms,
        **{
            name: value
            for name in ("weights", "kv_dtype", "attention", "drafts")
            if (value := getattr(arguments, name))
        },
    )
    return Engine(run.blueprint, run.variables, run.mesh, run.tokenizer, config)
