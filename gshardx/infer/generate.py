"""``gshardx.infer generate``: text after prompts, streamed."""

import argparse
import sys
from pathlib import Path

from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.models.generator import Generator, SamplingOptions
from gshardx.sharding import MeshConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR", help="a run of gshardx.train")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; repeat it for a batch")
    parser.add_argument(
        "--prompt_file", metavar="FILE", help='prompts, one a line; "-" reads standard input (also the default)'
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="tokens to add (default 100)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the best token (default 1.0)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k best tokens; 0: from all (default 0)")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the best tokens of this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the same for each prompt (default 0)")
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="N",
        help="room for prompt and text (default: trained sequence + max_new_tokens)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time (default 8)")
    for axis in MeshConfig().shape:
        parser.add_argument(f"--mesh.{axis}", dest=f"mesh_{axis}", type=int, default=1, metavar="N")


def mesh_of(arguments: argparse.Namespace) -> MeshConfig:
    return MeshConfig(**{axis: getattr(arguments, f"mesh_{axis}") for axis in MeshConfig().shape})


def generate(arguments: argparse.Namespace) -> int:
    """Load, compile, and print: one prompt streams as it is drawn, several are printed whole, in order.

    Raises:
        BadInput: see the parts.
    """
    _check(arguments)
    mesh = mesh_of(arguments)
    prompts = _prompts(arguments)
    run = load_run(arguments.run, mesh)
    generator = Generator(
        run.blueprint,
        run.variables,
        run.mesh,
        # From the flags alone, so that a long prompt changes nothing for its neighbours.
        length=arguments.max_length or run.config.data.sequence_length + arguments.max_new_tokens,
        rows=-(-arguments.batch_size // mesh.batch_shards) * mesh.batch_shards,
    )
    options = SamplingOptions(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    emitted = generator.generate(
        [run.tokenizer.encode(prompt) for prompt in prompts], arguments.max_new_tokens, options, run.tokenizer.end
    )
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for piece in run.tokenizer.stream(one.token for one in emitted):
            print(piece, end="", flush=True)
        print()
        return 0
    tokens: list[list[int]] = [[] for _ in prompts]
    for one in emitted:
        tokens[one.prompt].append(one.token)
    for prompt, continuation in zip(prompts, tokens, strict=True):
        print(f"{prompt}{run.tokenizer.decode(continuation)}\n", flush=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, low, high in (
        ("max_new_tokens", 1, None),
        ("temperature", 0, None),
        ("top_k", 0, 2**31 - 1),
        ("top_p", 0, 1),
        ("seed", 0, 2**32 - 1),
        ("max_length", 1, None),
        ("batch_size", 1, None),
    ):
        value = getattr(arguments, name)
        if value is not None and (not value >= low or (high is not None and value > high)):
            until = f" to {high}" if high is not None else " or more"
            raise BadInput(f"--{name} {value}: must be {low}{until}")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    file = arguments.prompt_file
    try:
        if file == "-" or (file is None and not prompts):
            prompts += sys.stdin.read().splitlines()
        elif file is not None:
            prompts += Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--prompt_file {file or '-'}: can't be read ({error})") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise BadInput("no prompt: give --prompt TEXT, --prompt_file FILE, or lines on standard input")
    return prompts
