"""From the hub's layout to a run directory: tensor by tensor, on no device, in the memory that one tensor takes."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from gshardx.checkpoint.arrays import Writer
from gshardx.checkpoint.beside import Part, continued_beside, fingerprint, to_disk
from gshardx.checkpoint.empty import held_by, write_empty
from gshardx.checkpoint.manifest import Shapes, write_manifest
from gshardx.cli import config_yaml
from gshardx.config import Config, DataConfig, OptimizerConfig
from gshardx.convert.rules import STATE, Leaf
from gshardx.convert.source import COMPUTED, Layout, Source, array_of, open_source
from gshardx.convert.tensors import packed, write_files
from gshardx.data.progress import Bar
from gshardx.data.tokenizer import load_tokenizer
from gshardx.errors import BadInput
from gshardx.models.items import items_of
from gshardx.sharding import MeshConfig, build_mesh

STEP = Path("checkpoints", "0")
"""Below the run."""
CARRIED = "huggingface"
"""Folder of a run with the source's own small files, as they were."""
AFTER = "layers_after.safetensors"
"""There: tensors of layers after the last."""
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".bin.index.json", ".onnx", ".lock")
BESIDE_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja")
LEARNING_RATE = 2e-5
"""Of a converted run's config.yaml: weights that are trained already bear less than new ones."""


def convert_in(source: Path, target: Path, dtype: str | None, say: Callable[[str], None] = print) -> None:
    """Write the run directory ``target``: config.yaml, tokenizer, and step 0 with the weights alone.

    Args:
        source: a directory with config.json and safetensors files.
        target: a directory that is empty or not there.
        dtype: of all weights, "float32" or "bfloat16"; None: as they are (float16 becomes float32).
        say: where lines go.

    Raises:
        BadInput: see :func:`gshardx.convert.source.open_source` and :meth:`Source.layout`; no room; or a target that
            can't be written.
    """
    opened = open_source(source)
    layout = opened.layout(build_mesh(MeshConfig()))
    dtypes = _dtypes(opened, layout, dtype)
    of = fingerprint(files_of(source), dtype=dtype, target=str(target))
    with continued_beside(target, "--to", "converts into it", of) as part:
        run = part.folder
        _check_room(part, opened, layout, dtypes, target)
        facts = _carry(opened, run, target, say)
        if opened.after.by_name:
            later = {f"{CARRIED}/{AFTER}": opened.after.planned}
            write_files(run, later, opened.tensors.read, lambda size: None, part)
            say(f"{len(opened.after.by_name)} tensors of layers after the last are kept, and not used")
        model = opened.model if dtype is None else dataclasses.replace(opened.model, dtype=COMPUTED[dtype])
        config = Config(
            run_dir=str(target),
            model=model,
            data=DataConfig(tokenizer=str(target / "tokenizer.json")) if facts else DataConfig(),
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        )
        (run / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
        _write_step(opened, layout, dtypes, part, facts)
    if opened.model.rope.get("scaling") == "longrope":
        learned = opened.model.rope["original_length"]
        say(f"{source}: positions turn as in texts of at most {learned} tokens, in longer ones too (docs/convert.md)")
    say(f"wrote {len(layout.pieces)} tensors of {source} ({opened.family.name}) to {target}")


def _dtypes(opened: Source, layout: Layout, dtype: str | None) -> dict[str, str]:
    """Of each parameter; the widest of its tensors'. The routers' state keeps its own."""
    found = {leaf.name: "float32" if leaf.name.startswith(STATE) else dtype or "float32" for leaf in layout.zeros}
    for piece in layout.pieces:
        theirs = opened.tensors.by_name[piece.name].dtype
        own = "bfloat16" if theirs.name == "bfloat16" else "float32"
        for leaf in piece.leaves:
            wanted = None if leaf.name.startswith(STATE) else dtype
            found[leaf.name] = wanted or ("float32" if "float32" in (own, found.get(leaf.name)) else own)
    return found


def files_of(folder: Path) -> list[Path]:
    """The files of a public model."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def _check_room(part: Part, opened: Source, layout: Layout, dtypes: dict[str, str], target: Path) -> None:
    sizes = {"float32": 4, "bfloat16": 2}
    needed = sum(int(np.prod(shape)) * sizes[dtypes[name]] for name, (shape, _) in layout.shapes.items())
    needed += sum(one.size for one in opened.after.planned) - part.held()
    free = shutil.disk_usage(part.folder).free
    if needed > free:
        raise BadInput(f"--to {target}: the disk is full: {needed:,} bytes to write, {free:,} free")


def _carry(opened: Source, run: Path, target: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Copy the small files, and write the tokenizer as runs have it; the fact that checkpoints are bound to."""
    (run / CARRIED).mkdir(exist_ok=True)
    for path in files_of(opened.folder):
        if not path.name.endswith(NOT_CARRIED):
            shutil.copyfile(path, run / CARRIED / path.name)
    for name in BESIDE_TOKENIZER:
        if (opened.folder / name).is_file():
            shutil.copyfile(opened.folder / name, run / name)
    mend = f"put one there as {target / 'tokenizer.json'} before you generate or train"
    if not (opened.folder / "tokenizer.json").is_file():
        say(f"{opened.folder}: no tokenizer.json; the weights are converted without a tokenizer; {mend}")
        return {}
    try:
        tokenizer = load_tokenizer(opened.folder / "tokenizer.json")
    except BadInput as error:
        say(f"{error}; the weights are converted without a tokenizer; {mend}")
        return {}
    if tokenizer.vocab_size > opened.vocab:
        raise BadInput(
            f"{opened.folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens, and config.json has vocab_size = "
            f"{opened.vocab}; is it this model's own?"
        )
    tokenizer.save(run / "tokenizer.json")
    return {"tokenizer": hashlib.sha256(tokenizer.text.encode()).hexdigest()}


def _write_step(opened: Source, layout: Layout, dtypes: dict[str, str], part: Part, facts: dict[str, str]) -> None:
    named = {array_of(name): dtype for name, dtype in dtypes.items()}
    chunks = {array_of(name): layout.chunk(name) for name in layout.shapes}
    shapes = _write_empty(layout, named, chunks, part)
    step, found = part.folder / STEP, opened.tensors.by_name
    ordered = sorted(layout.pieces, key=lambda piece: (found[piece.name].file, found[piece.name].begin))
    with Bar("convert", sum(found[piece.name].size for piece in ordered)) as bar, Writer(step) as writer:
        for leaf in layout.zeros:
            writer.put(array_of(leaf.name), (), np.zeros(layout.shapes[leaf.name][0], np.float32))
        for piece in ordered:
            files = {leaf: _file(leaf, chunks[array_of(leaf.name)]) for leaf in piece.leaves}
            if not all(map(part.has, files.values())):
                for leaf, values in opened.read(piece).items():
                    done = partial(part.finished, files[leaf])
                    writer.put(array_of(leaf.name), leaf.at, packed(values, values.dtype), done)
            bar.advance(found[piece.name].size)
    write_manifest(step, shapes, facts)


def _write_empty(layout: Layout, dtypes: dict[str, str], chunks: dict[str, list[int]], part: Part) -> Shapes:
    """The step without numbers, unless a killed conversion has left it."""
    items, folder = items_of(layout.plan.variables), part.folder / STEP.parent
    described = [str(STEP / name / "zarr.json") for name in dtypes]
    if all(map(part.has, described)):
        return held_by(items, dtypes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shapes = write_empty(folder, 0, items, dtypes, chunks)
    to_disk(folder)
    for path in described:
        part.finished(path)
    return shapes


def _file(leaf: Leaf, chunk: list[int]) -> str:
    """Below the run: where zarr has a chunk."""
    rest = [0] * (len(chunk) - len(leaf.at))
    return "/".join([str(STEP), array_of(leaf.name), "c", *map(str, (*leaf.at, *rest))])
