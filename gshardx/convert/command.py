"""``python -m gshardx.convert upcycle | moefy | permute | duplicate | prune | merge``: other experts for a run."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console

from gshardx.arguments import CommandParser
from gshardx.config import ModelConfig
from gshardx.convert.calibrate import Batch, compare, counts_on, read_batches
from gshardx.convert.moefy import Moefying, Split, moefied, moefied_part, network_of, random_split, split_network
from gshardx.convert.recall import layer_recall, recall_table
from gshardx.convert.reconstruct import kept_by_reconstruction, layer_inputs
from gshardx.convert.rewrite import ROUTER, Given, open_run, write_run
from gshardx.convert.surgery import (
    Change,
    Changed,
    duplicated,
    fewer,
    likeness_of,
    merged,
    most_chosen,
    permuted,
    saved_counts,
    sparse_layers,
    taken,
)
from gshardx.convert.upcycle import Upcycling, upcycled, upcycled_part
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig

TOKENS = 16_384
"""Of --data, by default."""
HELD_OUT = 5
"""Of so many tokens one measures what the others were fitted to."""
FILE_WIDTH = 120  # columns where nobody's window says


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m gshardx.convert", description="Give a run other experts (docs/experts.md).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (said, add, do) in COMMANDS.items():
        command = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        command.add_argument("run", type=Path, metavar="RUN_DIR")
        command.add_argument("target", type=Path, metavar="OUT_DIR", help="a directory that is empty or not there")
        add(command)
        command.add_argument("--step", type=int, metavar="N", help="of RUN_DIR (default: the newest)")
        command.add_argument(
            "--data",
            type=Path,
            metavar="PATH",
            help="text to count or compare on; says the loss on it before and after",
        )
        command.add_argument("--tokens", type=int, default=TOKENS, help=f"of --data (default {TOKENS:,})")
        command.set_defaults(do=do)
    given = parser.parse_args(argv)
    at_least(given, 1, "tokens")
    run = open_run(given.run, given.step)
    if given.data is not None and run.saved.step != open_run(given.run, None).saved.step:
        raise BadInput(f"--data: losses are the newest step's, and --step is {given.step}; leave one of them out")
    text = [] if given.data is None else read_batches(run, given.data, given.tokens)
    given.do(given, run, text)
    print(f"wrote step {run.saved.step} of {given.run} to {given.target}")
    if text:
        print(compare(given.run, given.target, text))
    return 0


def at_least(given: argparse.Namespace, least: float, *names: str) -> None:
    """Raise BadInput if a flag that was given is less, or not finite."""
    for name in names:
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise BadInput(f"--{name} {value}: must be {least} or more, and finite")


def add_upcycle(command: argparse.ArgumentParser) -> None:
    command.add_argument("--experts", type=int, required=True, metavar="E", help="of each MoE layer")
    command.add_argument("--top_k", type=int, required=True, metavar="K", help="experts that a token chooses")
    command.add_argument("--split", type=int, default=1, metavar="G", help="shards of each network; divides E and K")
    command.add_argument("--shared", type=int, default=0, metavar="UNITS", help="hidden units that all tokens use")
    command.add_argument("--gated", action="store_true", help="the shared expert has a sigmoid gate")
    command.add_argument("--noise", type=float, default=0.0, metavar="S", help="on experts, in deviations of theirs")
    command.add_argument("--every", type=int, metavar="N", help="experts in every Nth layer (default: as they are)")
    command.add_argument("--seed", type=int, default=0, help="of the router and the noise (default 0)")


def upcycle(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    at_least(given, 1, "experts", "top_k", "split", "every")
    at_least(given, 0, "shared", "noise", "seed")
    how = Upcycling(**{name: getattr(given, name) for name in Upcycling._fields})
    model = upcycled(run.config.model, how)
    write_run(run, given.target, model, lambda part: upcycled_part(run, model, how, part))
    shared = f", {how.shared} of its units shared" if how.shared else ""
    print(
        f"{model.moe_layers} layers: {how.experts} experts of {model.moe.hidden} hidden units each, {how.top_k} a token"
        f"{shared}; router drawn with seed {how.seed}"
    )
    print(f"noise {how.noise} with seed {how.seed}: not the same function" if how.noise else "the same function")


def add_moefy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--experts", type=int, required=True, metavar="E", help="of each layer that has one now")
    command.add_argument("--top_k", type=int, required=True, metavar="K", help="experts that a token chooses")
    said = "what hidden units are clustered by: input weights (default), or activations on --data"
    command.add_argument("--by", choices=("weights", "activations"), default="weights", help=said)
    command.add_argument("--seed", type=int, default=0, help="of the clusters (default 0)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the recall tables there, too")


def moefy(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    at_least(given, 2, "experts")
    at_least(given, 1, "top_k")
    at_least(given, 0, "seed")
    how = Moefying(**{name: getattr(given, name) for name in Moefying._fields})
    model = moefied(run.config.model, how)
    if not text:
        raise BadInput("moefy needs --data PATH, text to fit routers to and to measure them on")
    if given.json is not None and not given.json.parent.is_dir():
        raise BadInput(f"--json {given.json}: no directory {given.json.parent}; make it, or choose another")
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else FILE_WIDTH)
    splits: dict[int, Split] = {}
    numbers = []
    layers = sparse_layers(model)
    for layer, x in zip(layers, layer_inputs(load_run(run.saved.run, MeshConfig()), text), strict=True):
        network, held_out = network_of(run, layer), max(1, len(x) // HELD_OUT)
        fit, measure = x[:-held_out], x[-held_out:]
        splits[layer] = split_network(network, fit, how, layer)
        found = layer_recall(network, splits[layer], random_split(network, fit, how, layer), measure)
        console.print(recall_table(layer, found, how.top_k))
        numbers.append({"layer": layer, "fitted": len(fit), "measured": len(measure), **found.numbers()})
    write_run(run, given.target, model, lambda part: moefied_part(run, how, splits, part))
    if given.json is not None:
        given.json.write_text(json.dumps({**how._asdict(), "layers": numbers}, indent=1) + "\n", encoding="utf-8")
    same = "the same function" if how.top_k == how.experts else "not the same function"
    print(f"{len(layers)} layers: {how.experts} experts of {model.moe.hidden} hidden units each, {how.top_k} a token")
    print(f"routers fitted to {len(fit):,} tokens, recall on {len(measure):,} others; {same}")


def add_permute(command: argparse.ArgumentParser) -> None:
    command.add_argument("--order", required=True, metavar="A,B,...", help="old numbers in their new order, from 0")


def permute(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    try:
        order = [int(number) for number in given.order.split(",")]
    except ValueError as error:
        raise BadInput(f"--order {given.order}: must be numbers with commas between, such as 1,0,2,3") from error
    model = run.config.model
    change = permuted(order, model)
    _write(given, run, model, dict.fromkeys(sparse_layers(model), change))
    print("the same function")


def add_duplicate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--copies", type=int, required=True, metavar="N", help="of each expert, and times the choices")


def duplicate(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    at_least(given, 2, "copies")
    model, change = duplicated(run.config.model, given.copies)
    _write(given, run, model, dict.fromkeys(sparse_layers(model), change))
    print(f"{model.moe.num_experts} experts, of which a token chooses {model.moe.top_k}; the same function")


def add_fewer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keep", type=int, required=True, metavar="R", help="experts of each layer that stay")


def add_prune(command: argparse.ArgumentParser) -> None:
    add_fewer(command)
    said = "choices: the most chosen stay (default); reconstruction: those that change a layer's output least"
    command.add_argument("--by", choices=("choices", "reconstruction"), default="choices", help=said)


def prune(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    model, layers = fewer(run.config.model, given.keep), sparse_layers(run.config.model)
    stay: list[list[int]] = []
    if given.by == "choices":
        for chosen in _counts(run, text):
            stay.append(most_chosen(chosen, given.keep))
            share = chosen[stay[-1]].sum() / max(chosen.sum(), 1e-9)
            print(f"layer {layers[len(stay) - 1]}: keeps {_listed(stay[-1])}, which had {share:.1%} of the choices")
    else:
        if not text:
            raise BadInput("--by reconstruction needs --data PATH, text to compare outputs on")
        for experts, change in kept_by_reconstruction(load_run(run.saved.run, MeshConfig()), text, given.keep):
            stay.append(list(experts))
            print(f"layer {layers[len(stay) - 1]}: keeps {_listed(experts)}; its output changes by {change:.1%}")
    count = run.config.model.moe.num_experts
    _write(given, run, model, {layer: taken(own, count) for layer, own in zip(layers, stay, strict=True)})
    print("not the same function" if text else "not the same function; --data PATH says the loss")


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))


def merge(given: argparse.Namespace, run: Given, text: list[Batch]) -> None:
    model, counts = fewer(run.config.model, given.keep), _counts(run, text)
    changes = {}
    for layer, chosen in zip(sparse_layers(model), counts, strict=True):
        likeness = likeness_of(run.in_layer(layer, f"{ROUTER}kernel"))
        changes[layer] = merged(chosen, likeness, given.keep)
        groups = ["+".join(map(str, row.nonzero()[0])) for row in changes[layer].mix]
        print(f"layer {layer}: {', '.join(groups)}")
    _write(given, run, model, changes)
    print("not the same function" if text else "not the same function; --data PATH says the loss")


def _counts(run: Given, text: list[Batch]) -> Float[np.ndarray, "moe_layer e"]:
    """Of choices, on the text or in training."""
    return counts_on(run.saved.run, text, run.config.model.moe.num_experts) if text else saved_counts(run)


def _write(given: argparse.Namespace, run: Given, model: ModelConfig, changes: dict[int, Change]) -> None:
    new = Changed(run, changes)
    write_run(run, given.target, model, new.value, new.state())


class Command(NamedTuple):
    """said: by --help; add: its flags; do: writes OUT_DIR, given its text."""

    said: str
    add: Callable[[argparse.ArgumentParser], None]
    do: Callable[[argparse.Namespace, Given, list[Batch]], None]


COMMANDS = {
    "upcycle": Command("a dense run becomes one with experts that computes the same", add_upcycle, upcycle),
    "moefy": Command("a dense ReLU run becomes one whose experts are parts of it", add_moefy, moefy),
    "permute": Command("experts in another order; the same function", add_permute, permute),
    "duplicate": Command("several copies of each expert; the same function", add_duplicate, duplicate),
    "prune": Command("the most chosen experts stay, or those that matter most", add_prune, prune),
    "merge": Command("the most chosen experts stay, and take in the others", add_fewer, merge),
}
