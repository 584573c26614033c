"""``gshardx.infer generate``: text after prompts, streamed."""

import argparse
import sys
from pathlib import Path

from gshardx.errors import BadInput
from gshardx.infer.answers import Answers
from gshardx.infer.load import load_run
from gshardx.infer.options import add_model_flags, add_sampling_flags, engine_of, mesh_of, sampling_of
from gshardx.infer.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; repeat it for a batch")
    parser.add_argument(
        "--prompt_file", metavar="FILE", help='prompts, one a line; "-" reads standard input (also the default)'
    )
    add_sampling_flags(parser)
    add_model_flags(parser)


def generate(arguments: argparse.Namespace) -> int:
    """Load, compile, and print: one prompt streams as it is drawn, several are printed whole, in order.

    Raises:
        BadInput: see the parts.
    """
    params, prompts = sampling_of(arguments), _prompts(arguments)
    run = load_run(arguments.run, mesh_of(arguments))
    engine = engine_of(arguments, run, len(prompts), params.max_new_tokens)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(f"{number + 1}", run.tokenizer.encode(prompt), params))
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for output in engine.run():
            print(output.text, end="", flush=True)
        print()
        return 0
    texts = {answer.id: answer.text for answer in Answers().finished(engine.run())}
    for number, prompt in enumerate(prompts):
        print(f"{prompt}{texts[f'{number + 1}']}\n", flush=True)
    return 0


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
