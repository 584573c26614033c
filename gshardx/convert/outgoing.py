"""From a run directory, or a model on a mesh, to the hub's layout, tensor by tensor."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gshardx.checkpoint.beside import Part, continued_beside, fingerprint
from gshardx.checkpoint.checked import Checked
from gshardx.checkpoint.manifest import NAME
from gshardx.checkpoint.places import Saved, find
from gshardx.cli import read_config
from gshardx.config import ModelConfig
from gshardx.convert.families import FAMILIES, family_of
from gshardx.convert.family import Family
from gshardx.convert.incoming import AFTER, CARRIED
from gshardx.convert.rules import STATE, Leaf
from gshardx.convert.settings import at_inference, difference, write_settings
from gshardx.convert.source import Layout, array_of, layout_of, understood
from gshardx.convert.source import read_config as read_theirs
from gshardx.convert.tensors import INDEX, Planned, Tensors, open_file, read_index, write_tensors
from gshardx.data.progress import Bar
from gshardx.errors import BadInput
from gshardx.models.items import weights_item
from gshardx.sharding import MeshConfig, build_mesh

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
QUANTISED = "quantization_config"
LARGEST = 5_000_000_000
"""Bytes of a file by default, as the hub has them."""


class Form(NamedTuple):
    """A model as another library's: its family, and the whole config.json but the type.

    ``after``: tensors of layers after the last, which it came with.
    """

    family: Family
    config: dict[str, Any]
    after: Tensors = Tensors({})


def convert_out(
    source: Path,
    target: Path,
    step: int | None = None,
    dtype: str | None = None,
    largest: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write config.json, safetensors files with their index, and the files that came with the weights.

    Args:
        source: a run directory; one that was converted goes back to its own family.
        target: a directory that is empty or not there.
        step: of the run; None: the newest.
        dtype: of all tensors, one of :data:`DTYPES`; None: as they are.
        largest: bytes of a file; None: each tensor in the file that it came from, else :data:`LARGEST`.
        say: where lines go.

    Raises:
        BadInput: a damaged step, a model that no family has, no room, or a target that can't be written.
    """
    model, saved = read_config(source / "config.yaml").model, find(source, step)
    item = weights_item("ema" in saved.items)
    vocab = saved.manifest.arrays[f"{item}/embedding.table"][0][0]
    carried = source / CARRIED
    form = form_of(model, vocab, carried if carried.is_dir() else None, str(source))
    layout = layout_of(form.family, model, vocab, build_mesh(MeshConfig()))
    own = {name: saved.manifest.arrays[array_of(name, item)][1] for name in layout.shapes}
    places = _places(carried, layout, form) if largest is None else largest
    weights = Checked(saved, item, STATE.rstrip("."))
    small = [*source.iterdir(), saved.folder / NAME, *(carried.iterdir() if carried.is_dir() else ())]
    of = fingerprint(filter(Path.is_file, small), item=item, dtype=dtype, largest=largest)

    def value(leaf: Leaf) -> np.ndarray:
        return weights.get(array_of(leaf.name, item), leaf.at)

    with continued_beside(target, "--to", "converts into it", of) as part:
        _carry_back(source, saved, part.folder)
        write_model(part.folder, form, layout, own, dtype, places, value, part)
    if QUANTISED in form.config:
        say(f"{source}: it came quantised, and goes out as {dtype or own['embedding.table']}, without {QUANTISED}")
    say(f"wrote {len(layout.pieces)} tensors of step {saved.step} to {target} ({form.family.name})")


def _places(carried: Path, layout: Layout, form: Form) -> Mapping[str, str] | int:
    """The files that the tensors came in, if they came in several."""
    if not (carried / INDEX).is_file():
        return LARGEST
    places, names = read_index(carried), [*(piece.name for piece in layout.pieces), *form.after.by_name]
    return {name: places[name] for name in names} if places.keys() >= set(names) else LARGEST


def form_of(model: ModelConfig, vocab: int, carried: Path | None, where: str) -> Form:
    """The family and config.json of a model: what it came with, else what its own config says.

    Raises:
        BadInput: it is no longer what it came as, or no family has such models; names the first key that differs.
    """
    if carried is not None and (carried / "config.json").is_file():
        config = read_theirs(carried)
        family = family_of(config, f"{carried / 'config.json'}")
        if what := difference(model, understood(config, family, f"{carried / 'config.json'}")):
            raise BadInput(f"{where}: it came as {family.name}, and now has {what}; bring the old value back")
        after = open_file(carried / AFTER) if (carried / AFTER).is_file() else Tensors({})
        return Form(family, config, after)
    reasons = {}
    for family in FAMILIES.values():
        config = _written(family, model, vocab)
        try:
            what = difference(model, understood(config, family, "config.json"))
        except BadInput as error:
            what = str(error)
        if what is None:
            return Form(family, config)
        reasons[family.name] = what
    said = "; ".join(f"{name}: {what}" for name, what in reasons.items())
    raise BadInput(f"{where}: no architecture here has such a model ({said})")


def _written(family: Family, model: ModelConfig, vocab: int) -> dict[str, Any]:
    head = {"architectures": [family.architecture], "model_type": family.name, "hidden_act": "silu"}
    said = dataclasses.replace(at_inference(model), hidden=model.hidden)
    return head | dict(family.also) | write_settings(said, family.settings) | {"vocab_size": vocab}


def write_model(
    folder: Path,
    form: Form,
    layout: Layout,
    own: Mapping[str, str],
    dtype: str | None,
    places: Mapping[str, str] | int,
    value: Callable[[Leaf], np.ndarray],
    part: Part | None = None,
) -> None:
    """Write config.json and all tensors.

    Args:
        folder: where.
        form, layout: of the model.
        own: each parameter's type.
        dtype: of all tensors but the routers' state and what is not used; None: their own.
        places: as for :func:`gshardx.convert.tensors.write_tensors`.
        value: of a leaf; asked for once each, by another thread.
        part: as for :func:`gshardx.convert.tensors.write_tensors`.
    """
    by_name = {piece.name: piece for piece in layout.pieces}
    planned = list(form.after.planned)
    for piece in layout.pieces:
        first = piece.leaves[0].name
        learned = not first.startswith(STATE)
        wanted = dtype if learned and dtype else own[first]
        planned.append(Planned(piece.name, DTYPES[wanted], piece.shape, learned))
    needed, free = sum(one.size for one in planned), shutil.disk_usage(folder).free
    if needed - (0 if part is None else part.held()) > free:
        raise BadInput(f"{folder.parent}: the disk is full: {needed:,} bytes to write, {free:,} free")
    _write_config(folder, form, dtype or own["embedding.table"])
    with Bar("convert", needed) as bar:

        def tensor(name: str) -> np.ndarray:
            if name in form.after.by_name:
                return form.after.read(name)
            piece = by_name[name]
            return piece.outwards({leaf: value(leaf) for leaf in piece.leaves})

        write_tensors(folder, planned, tensor, places, bar.advance, part)


def _write_config(folder: Path, form: Form, dtype: str) -> None:
    config = {key: value for key, value in form.config.items() if key != QUANTISED}
    spelling = "dtype" if "dtype" in config else "torch_dtype"
    unchanged = config.get(spelling) == dtype and QUANTISED not in form.config
    if not unchanged or not (folder / "config.json").exists():  # else it stays as it came
        config[spelling] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _carry_back(source: Path, saved: Saved, folder: Path) -> None:
    """The files that came with the weights, as they were; of another run its tokenizer."""
    if (source / CARRIED).is_dir():
        for path in sorted((source / CARRIED).iterdir()):
            if path.name not in (INDEX, AFTER):
                shutil.copyfile(path, folder / path.name)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
