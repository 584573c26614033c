"""A run directory from another: the same model with other layers, array by array, in the memory that one takes."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gshardx.checkpoint.arrays import Writer, get
from gshardx.checkpoint.beside import written_beside
from gshardx.checkpoint.empty import write_empty
from gshardx.checkpoint.export import KEPT
from gshardx.checkpoint.manifest import Shapes, damage, write_manifest
from gshardx.checkpoint.places import Saved, find
from gshardx.checkpoint.store import array_shapes
from gshardx.cli import config_yaml, read_config
from gshardx.config import Config, ModelConfig
from gshardx.convert.incoming import CARRIED
from gshardx.convert.rules import spot_of
from gshardx.convert.source import ITEM
from gshardx.data.progress import Bar
from gshardx.errors import BadInput
from gshardx.models.build import blueprint
from gshardx.models.items import items_of, weights_item
from gshardx.sharding import MeshConfig, build_mesh

EXPERTS, ROUTER = "feed_forward.experts.", "feed_forward.router."
_STATE = "router"


class Part(NamedTuple):
    """What is in memory at once: of an array of the new run, one layer, and of experts' arrays one expert."""

    name: str
    at: tuple[int, ...]
    layer: int | None
    """None: outside of all layers."""
    rest: str
    """The name within the layer, such as ``feed_forward.experts.w_up``."""
    expert: int | None


@dataclasses.dataclass(frozen=True)
class Given:
    """A step of a run that is read: ``saved``'s weights, the averaged ones where there are any."""

    config: Config
    saved: Saved
    item: str

    @property
    def vocab(self) -> int:
        return self.saved.manifest.arrays[f"{self.item}/embedding.table"][0][0]

    @property
    def dtypes(self) -> dict[str, str]:
        """Of the weights, by name."""
        below = f"{self.item}/"
        arrays = self.saved.manifest.arrays.items()
        return {name.removeprefix(below): dtype for name, (_, dtype) in arrays if name.startswith(below)}

    def outside(self, part: Part) -> np.ndarray:
        """The same part."""
        return get(self.saved.folder / self.item, part.name, part.at)

    def in_layer(self, layer: int, rest: str, expert: int | None = None) -> np.ndarray:
        """An array of a layer, or one expert's of it."""
        spot = spot_of(self.config.model, layer)
        at = spot.at if expert is None else (*spot.at, expert)
        return get(self.saved.folder / self.item, f"{spot.block}.{rest}", at)

    def state(self, number: str) -> np.ndarray:
        """A leaf of the routers' state, ``[moe_layer, e]``, or ``[moe_layer]``."""
        return get(self.saved.folder / _STATE, number, ())


def open_run(run: Path, step: int | None) -> Given:
    """Raises:
    BadInput: no run, no such step, or a damaged one.
    """
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{run}: no config.yaml there; give a run directory (a public model becomes one with --from)")
    config, saved = read_config(run / "config.yaml"), find(run, step)
    item = weights_item("ema" in saved.items)
    if bad := damage(saved.folder, saved.manifest.checksum, saved.manifest.below(item, _STATE)):
        raise BadInput(f"{saved.folder}: {bad}; choose another --step")
    return Given(config, saved, item)


def parts(model: ModelConfig, shapes: Shapes) -> Iterator[Part]:
    """All parts of a model whose parameters are ``shapes``, layer by layer."""
    inside = set()
    for layer in range(model.layers):
        block, at, _ = spot_of(model, layer)
        for name in [name for name in shapes if name.startswith(f"{block}.")]:
            inside.add(name)
            rest = name[len(block) + 1 :]
            for expert in range(model.moe.num_experts) if rest.startswith(EXPERTS) else [None]:
                yield Part(name, at if expert is None else (*at, expert), layer, rest, expert)
    for name in shapes.keys() - inside:
        yield Part(name, (), None, name, None)


def write_run(
    given: Given,
    target: Path,
    model: ModelConfig,
    value: Callable[[Part], np.ndarray],
    state: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the run directory ``target``: ``given``'s with another model, as step 0 with the weights alone.

    Args:
        given: where the config, the tokenizer and the arrays' types come from; arrays that it lacks are float32.
        target: a directory that is empty or not there.
        model: the new one.
        value: of each part; asked for once.
        state: the leaves of the routers' state, for routers that have one.

    Raises:
        BadInput: a model that can't be, no room, or a target that can't be written.
    """
    plan = blueprint(model, given.vocab, build_mesh(MeshConfig()))
    shapes = {name.partition("/")[2]: about for name, about in array_shapes({ITEM: plan.params}).items()}
    todo = list(parts(model, shapes))
    dtypes = {part.name: _dtype(given, part) for part in todo}
    ranks = {part.name: len(part.at) for part in todo}
    facts = {key: fact for key, fact in given.saved.manifest.extra.items() if key == "tokenizer"}
    sizes = {name: int(np.prod(shape[ranks[name] :])) * np.dtype(dtypes[name]).itemsize
             for name, (shape, _) in shapes.items()}  # fmt: skip
    needed = sum(sizes[part.name] for part in todo)
    with written_beside(target, "OUT_DIR", "writes to it") as run:
        free = shutil.disk_usage(run).free
        if needed > free:
            raise BadInput(f"{target}: the disk is full: {needed:,} bytes to write, {free:,} free")
        _write_beside_weights(given, run, target, model)
        folder = run / "checkpoints"
        folder.mkdir()
        items = items_of(plan.variables)
        named = {f"{ITEM}/{name}": dtype for name, dtype in dtypes.items()}
        chunks = {f"{ITEM}/{name}": [1] * ranks[name] + shape[ranks[name] :] for name, (shape, _) in shapes.items()}
        for name, (shape, dtype) in array_shapes({key: items[key] for key in items if key != ITEM}).items():
            named[name], chunks[name] = dtype, shape
        written = write_empty(folder, 0, items, named, chunks)
        with Bar("write", needed) as bar, Writer(folder / "0" / ITEM) as writer:
            for part in todo:
                writer.put(part.name, part.at, value(part))
                bar.advance(sizes[part.name])
        with Writer(folder / "0" / _STATE) as writer:
            for number, leaf in enumerate(jax.tree.leaves(plan.router)):
                zeros = np.zeros(leaf.shape, leaf.dtype)
                writer.put(str(number), (), zeros if state is None else state[str(number)])
        write_manifest(folder / "0", written, facts)


def _dtype(given: Given, part: Part) -> str:
    """As the array was, or that array of other layers, or that of another feed-forward network; else float32."""
    found, last = given.dtypes, part.rest.rpartition(".")[2]
    same = [part.name, *(name for name in found if name.endswith(f".{part.rest}"))]
    if last in ("w_up", "w_gate", "w_down"):
        same += [name for name in found if name.endswith(f".{last}")]
    return next((found[name] for name in same if name in found), "float32")


def _write_beside_weights(given: Given, run: Path, target: Path, model: ModelConfig) -> None:
    """The small files; a public model's own only where the model is still that one."""
    source, config = given.saved.run, given.config
    for name in KEPT:
        if name != "config.yaml" and (source / name).is_file():
            shutil.copyfile(source / name, run / name)
    if model == config.model and (source / CARRIED).is_dir():
        shutil.copytree(source / CARRIED, run / CARRIED)
    has_one = (source / "tokenizer.json").is_file()
    tokenizer = str(target / "tokenizer.json") if has_one else config.data.tokenizer
    config = dataclasses.replace(
        config,
        run_dir=str(target),
        model=model,
        mesh=MeshConfig(),  # another number of experts divides over other meshes
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
        optimizer=dataclasses.replace(config.optimizer, ema_decay=None),  # there is no average of what is new
    )
    (run / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
