"""A trained run, ready to decode: config, tokenizer and parameters, without optimizer state."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh

from gshardx.checkpoint.manifest import Manifest
from gshardx.checkpoint.restore import restore
from gshardx.checkpoint.store import Items
from gshardx.cli import read_config
from gshardx.config import Config, check_model_on_mesh
from gshardx.data.tokenizer import Tokenizer, load_tokenizer
from gshardx.errors import BadInput
from gshardx.models.build import Blueprint, Variables, blueprint, rows_of_vocabulary
from gshardx.models.items import items_of, variables_of
from gshardx.sharding import MeshConfig, build_mesh


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """variables lie on ``mesh``; step is the checkpoint's."""

    config: Config
    tokenizer: Tokenizer
    blueprint: Blueprint
    variables: Variables
    mesh: Mesh
    step: int


def load_run(path: Path, mesh_config: MeshConfig) -> LoadedRun:
    """Load the newest good checkpoint of ``path`` onto a mesh of any shape; only parameters are read: the averaged ones
    where the run has them (``optimizer.ema_decay``).

    Raises:
        BadInput: not a run, no good checkpoint, or a damaged tokenizer.
    """
    if not (path / "config.yaml").is_file():
        raise BadInput(f"--run {path}: no config.yaml there; give a directory that gshardx.train has written")
    config = read_config(path / "config.yaml")
    check_model_on_mesh(config.model, mesh_config)
    averaged = config.optimizer.ema_decay is not None
    tokenizer = load_tokenizer(path / "tokenizer.json")
    digest = hashlib.sha256(tokenizer.text.encode()).hexdigest()
    mesh = build_mesh(mesh_config)
    plan = blueprint(config.model, rows_of_vocabulary(config.model, tokenizer.vocab_size), mesh)

    def wanted(step: int, manifest: Manifest) -> Items:
        # Converted weights may have come without one.
        if manifest.extra.get("tokenizer", digest) != digest:
            raise BadInput(
                f"{path / 'tokenizer.json'}: not the tokenizer that step {step} was trained with; restore it"
            )
        return items_of(plan.variables, averaged)

    found = restore(path / "checkpoints", wanted, lambda line: print(line, file=sys.stderr))
    if found is None:
        raise BadInput(f"--run {path}: no good checkpoint in {path / 'checkpoints'}; train it first")
    step, loaded = found
    variables = jax.block_until_ready(variables_of(loaded, plan.variables, averaged))
    return LoadedRun(config, tokenizer, plan, variables, mesh, step)
