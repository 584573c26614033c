"""Command lines: a YAML file, ``--section.field value`` over it, and one line for each of the user's mistakes."""

import argparse
import dataclasses
import difflib
import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse
import yaml

from gshardx.config import Config
from gshardx.errors import BadInput
from gshardx.sharding.startup import keep_compiled, without_an_absent_tpu

_WIDEST = 80
"""Characters of choices beside a flag in --help."""

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Call ``main`` with the command line and exit: 0 done, 1 a bug, 2 bad input, 3 others missing (a line)."""
    # Libraries' own notices on stderr (Orbax's OCDBT merge) bury the one line that matters.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    without_an_absent_tpu()
    keep_compiled()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: the disk is full ({error.filename or 'while writing'}); free some space", file=sys.stderr)
        code = 2
    gc.freeze()  # or Python looks for garbage in all of JAX once more, for half a second and longer
    sys.exit(code)


def parse_config(prog: str, description: str, argv: list[str]) -> tuple[Config, Path | None]:
    """The merged config and the path of its (last) file.

    Raises:
        BadInput: unknown key (names the nearest), wrong type, unreadable file, or values that contradict each other.
    """
    parser = _parser(prog, description)
    try:
        files, flags = _files_and_flags(argv)
        for file in files:
            _check_file(file)
        config = _config(parser, parser.parse_args([f"--config={file}" for file in files] + flags))
    except (argparse.ArgumentError, TypeError) as error:
        raise BadInput(_explain(str(error))) from error
    return config, files[-1] if files else None


def read_config(path: Path) -> Config:
    """The config in a YAML file.

    Raises:
        BadInput: as :func:`parse_config`, with the file's name.
    """
    _check_file(path)
    parser = _parser("gshardx", "")
    try:
        return _config(parser, parser.parse_args(["--config", str(path)]))
    except (argparse.ArgumentError, TypeError, BadInput) as error:
        raise BadInput(f"{path}: {_explain(str(error))}") from error


def config_yaml(config: Config) -> str:
    """YAML that :func:`read_config` reads back to an equal config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Dumper(yaml.SafeDumper):
    """Quotes strings such as 1e3, which YAML 1.2 and jsonargparse read as numbers."""


def _represent_string(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quoted = re.fullmatch(r"[-+.\d].*", text) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _represent_string)


def _files_and_flags(argv: list[str]) -> tuple[list[Path], list[str]]:
    """The files of ``--config``, and the rest with ``--print_config`` last, so that flags win wherever they stand."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", action="append", default=[], type=Path)
    known, flags = early.parse_known_args(argv)
    return known.config, sorted(flags, key=lambda flag: flag.split("=")[0] == "--print_config")


def _check_file(path: Path) -> None:
    """Raise BadInput unless ``path`` holds known keys, each section a mapping, each value of its type."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: no keys in it; write some, for example seed: 0")
    _check_keys(path, tree, "")
    parser = _parser("gshardx", "")
    try:
        parser.parse_args(["--config", str(path)])
    except (argparse.ArgumentError, TypeError) as error:
        raise BadInput(f"{path}: {_explain(str(error))}") from error


def _check_keys(path: Path, tree: dict[Any, Any], prefix: str) -> None:
    keys = _keys(Config)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        section = any(known.startswith(f"{key}.") for known in keys)
        if section and not isinstance(value, dict):
            raise BadInput(f"{path}: {key} is a section; indent its keys below it")
        if isinstance(value, dict) and (section or key not in keys):
            _check_keys(path, value, f"{key}.")
        elif not section and key not in keys:
            raise BadInput(f"{path}: {_unknown(key)}")


def _unknown(key: str) -> str:
    return f"unknown key {key}; did you mean {difflib.get_close_matches(key, _keys(Config), n=1, cutoff=0.0)[0]}?"


def _keys(section: Any, prefix: str = "") -> list[str]:
    """Every key of a config, dotted; a mapping of free names is one key."""
    types = get_type_hints(section)
    return [
        key
        for name in types
        for key in (
            _keys(types[name], f"{prefix}{name}.") if dataclasses.is_dataclass(types[name]) else [f"{prefix}{name}"]
        )
    ]


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
    for action in parser._actions:
        if isinstance(action.metavar, str) and len(action.metavar) > _WIDEST:  # the type, below, has the choices too
            action.metavar = action.dest.rsplit(".")[-1].upper()
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
        return _unknown(unknown)
    message = re.sub(
        r"Does not validate against .*<class '(\w+)'>, <class 'NoneType'>.*Given value: ",
        r"expected \1 or null. Got value: ",
        message,
    )
    message = re.sub(r"Expected an? typing\.Literal\[(.*?)\]", r"expected one of \1", message)
    return re.sub(r"Expected an? <class '(\w+)'>\.", r"expected \1.", message).replace('Parser key "', '"')
