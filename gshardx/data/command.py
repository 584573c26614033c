"""The command line of ``python -m gshardx.data``."""

import argparse

from gshardx.arguments import CommandParser
from gshardx.config import DataConfig
from gshardx.data.tokenize import Settings, tokenize

DESCRIPTION = """Turn a corpus into a folder of ArrayRecord shards of tokens, once; training then reads it with
--data.path FOLDER, without loading it into memory. After an interruption the same command goes on from the last whole
shard, and ends with the same bytes. Exit codes: 0 done, 2 bad input."""


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m gshardx.data", description="Prepare text for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_arguments(commands.add_parser("tokenize", help="text to shards of tokens", description=DESCRIPTION))
    arguments = vars(parser.parse_args(argv))
    del arguments["command"]
    config = DataConfig(  # its checks are those of training
        path=arguments["path"],
        **{name: arguments[name] for name in ("tokenizer", "vocab_size", "validation_fraction")},
    )
    tokenize(Settings(**{**arguments, "path": list(config.path)}))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DataConfig()
    parser.add_argument(
        "--path", action="append", required=True, help="as data.path: file, folder or glob; may be repeated"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--column", default=default.column, help="field of JSONL or column of Parquet (%(default)s)")
    parser.add_argument("--tokenizer", default=default.tokenizer, help="bpe, bytes or a tokenizer.json (%(default)s)")
    parser.add_argument("--vocab_size", type=int, default=default.vocab_size, help="of a trained BPE (%(default)s)")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=default.validation_fraction,
        help="documents that a BPE is not trained on, as data.validation_fraction of the run (%(default)s)",
    )
    parser.add_argument(
        "--on_error", choices=["fail", "skip"], default=default.on_error, help="at a broken record (%(default)s)"
    )
    parser.add_argument(
        "--shard_tokens", type=int, default=1 << 26, help="a shard ends with the document that fills it (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; with 1, the tokenizer's own threads (%(default)s)"
    )
