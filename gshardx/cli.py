"""Command lines: a YAML file, ``--section.field value`` over it, and one line for each of the user's mistakes."""

import argparse
import dataclasses
import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from gshardx.config import Config
from gshardx.errors import BadInput

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Call ``main`` with the command line and exit: 0 done, 2 bad input (one line), 1 a bug (traceback)."""
    # Libraries' own notices on stderr (XLA's CPU feature lists, Orbax's OCDBT merge) bury the one line that matters.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({error.filename or 'while writing'}); free some space", file=sys.stderr)
        code = 2
    sys.exit(code)


def parse_config(prog: str, description: str, argv: list[str]) -> tuple[Config, Path | None]:
    """The merged config and the path of its (last) file.

    Raises:
        BadInput: unknown key (names the nearest), wrong type, unreadable file, or values that contradict each other.
    """
    parser = _parser(prog, description)
    try:
        namespace = parser.parse_args(argv)
        config = _config(parser, namespace)
    except (argparse.ArgumentError, TypeError) as error:
        raise BadInput(_explain(str(error))) from error
    files = namespace.get("config") or []
    return config, Path(str(files[-1])) if files else None


def read_config(path: Path) -> Config:
    """The config in a YAML file.

    Raises:
        BadInput: as :func:`parse_config`, with the file's name.
    """
    parser = _parser("gshardx", "")
    try:
        return _config(parser, parser.parse_args(["--config", str(path)]))
    except (argparse.ArgumentError, TypeError, BadInput) as error:
        raise BadInput(f"{path}: {_explain(str(error))}") from error


def config_yaml(config: Config) -> str:
    """YAML that :func:`read_config` reads back to an equal config."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parser(prog: str, description: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config FILE [--section.field VALUE ...]",
        description=description,
        allow_abbrev=False,  # or --model.moe.num_expert would quietly set num_experts
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; repeat it to lay one over another")
    parser.add_class_arguments(Config)
    return parser


def _config(parser: jsonargparse.ArgumentParser, namespace: jsonargparse.Namespace) -> Config:
    values = parser.instantiate(namespace)
    return Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})


def _explain(message: str) -> str:
    """jsonargparse's message in one line, with the nearest key where a key is unknown."""
    message = " ".join(message.split())
    in_file = re.search(r"(?:Group '([\w.]+)' does not accept|[Dd]oes not accept) option '([\w.]+)'", message)
    on_line = re.search(r"unrecognized arguments: --([\w.]+)", message)
    unknown = None
    if in_file:
        unknown = ".".join(part for part in in_file.groups() if part)
    elif on_line:
        unknown = on_line.group(1)
    if unknown:
        keys = [key for key, _ in flatten(dataclasses.asdict(Config()))]
        nearest = difflib.get_close_matches(unknown, keys, n=1, cutoff=0.0)[0]
        return f"unknown key {unknown}; did you mean {nearest}?"
    return re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1.", message).replace('Parser key "', '"')
