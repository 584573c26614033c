"""Reading a run's newest checkpoint back: checksums are taken while arrays load, and a damaged step gives way to an
older one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax

from gshardx.checkpoint.manifest import NAME, Files, Manifest, damage, missized, read_manifest
from gshardx.checkpoint.store import Items, load, step_folders
from gshardx.errors import BadInput
from gshardx.sharding.distributed import exchange, on_first

Say = Callable[[str], None]
Wanted = Callable[[int, Manifest], Items]
"""What to load of a step, abstract as for :func:`gshardx.checkpoint.store.load`; may raise to refuse the step."""


def restore(folder: Path, wanted: Wanted, say: Say, *, below: int | None = None) -> tuple[int, Items] | None:
    """The newest step whose files are as they were saved, and its items; None if there is no such step.

    A collective call; process 0 takes the checksums.

    Args:
        folder: RUN_DIR/checkpoints.
        wanted: items to load; files of others are not looked at.
        say: gets a line for each damaged step, on process 0.
        below: look at earlier steps only.

    Raises:
        BadInput: see ``wanted`` and :func:`gshardx.checkpoint.store.load`.
    """
    while True:
        said = exchange(on_first(lambda below=below: str(_candidate(folder, wanted, say, below))) or "")[0]  # type: ignore[misc]
        if said == str(None):
            return None
        step = int(said)
        manifest = read_manifest(folder / said)
        if manifest is None:
            raise BadInput(
                f"{folder / said}: process {jax.process_index()} sees another folder than process 0; share it"
            )
        loaded, bad = _load_and_look(folder, step, wanted(step, manifest), manifest)
        if bad is None:
            return step, loaded
        del loaded  # or two of them would be in memory
        on_first(lambda bad=bad, step=step: say(_line(folder / str(step), bad)))  # type: ignore[misc]
        below = step


def _load_and_look(folder: Path, step: int, abstract: Items, manifest: Manifest) -> tuple[Items, str | None]:
    """The items, and what is wrong with their files. On all processes the same, or an error that damage does not
    explain."""
    failure, loaded = None, Items()
    files = manifest.below(*abstract) if jax.process_index() == 0 else Files()
    with ThreadPoolExecutor(1) as beside:
        looking = beside.submit(damage, folder / str(step), manifest.checksum, files)
        try:
            loaded = load(folder, step, abstract)
        except BadInput:
            raise
        except Exception as error:
            failure = error
        bad = exchange(looking.result() or "")[0] or None
    if failure is not None and bad is None:
        raise failure
    return loaded, bad


def _candidate(folder: Path, wanted: Wanted, say: Say, below: int | None) -> int | None:
    """The newest step with a manifest, files of the right sizes, and good descriptions of its arrays: on a damaged
    description Orbax raises what it likes, on damaged values nothing."""
    for step in reversed([step for step in step_folders(folder) if below is None or step < below]):
        bad = _obvious_damage(folder / str(step), partial(wanted, step))
        if bad is None:
            return step
        say(_line(folder / str(step), bad))
    return None


def _obvious_damage(step: Path, wanted: Callable[[Manifest], Items]) -> str | None:
    manifest = read_manifest(step)
    if manifest is None:
        return "manifest.json is damaged" if (step / NAME).exists() else "never finished (no manifest.json)"
    files = manifest.below(*wanted(manifest))
    descriptions = {name: about for name, about in files.items() if not _holds_values(name)}
    return missized(step, files) or damage(step, manifest.checksum, descriptions)


def _holds_values(name: str) -> bool:
    """Zarr's chunks are ITEM/ARRAY/c/0/1."""
    return "c" in name.split("/")[2:]


def _line(step: Path, bad: str) -> str:
    return f"checkpoint {step}: {bad}; trying an older one"
