"""Checkpoints of a run: asynchronous, sharded, checksummed. The only module that knows Orbax.

RUN_DIR/checkpoints/STEP holds items such as ``params``, ``optimizer``, ``ema``, ``rng`` and ``data``, each readable
alone, and a manifest of checksums. Each array is a folder of its own (no OCDBT), so that a damaged file names its
array.
"""

import contextlib
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from gshardx.checkpoint.arrays import FLOATS
from gshardx.checkpoint.manifest import NAME, SCORE, Manifest, Shapes, read_manifest, score_of, write_manifest
from gshardx.checkpoint.prune import kept
from gshardx.errors import BadInput
from gshardx.sharding.distributed import exchange, on_first

Items = dict[str, Any]
"""Item name to a pytree of arrays, or to a Grain iterator."""

_SPLIT_REPLICAS_FROM = 1 << 20  # bytes: below it, one device writes an array that many hold, into one file
_TIMEOUT_SECONDS = 3600
_BLOCK = 4096


class SaveFailed(BadInput):
    """``what`` failed, and how a run that ends here goes on."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}; {mend}")
        self.what = what


class CheckpointStore:
    """Saves steps of one run and finds the newest good one.

    Args:
        folder: RUN_DIR/checkpoints.
        every: steps between saves.
        keep: newest steps to keep.
        extra: facts to store with every step (JSON).
        keep_every: keep also the steps that it divides.
        keep_best: keep also so many with the least score.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        extra: dict[str, Any] | None = None,
        *,
        keep_every: int | None = None,
        keep_best: int = 0,
    ) -> None:
        self.folder = folder.absolute()
        self.extra = extra or {}
        self._scores = {step: score_of(self.folder / str(step)) for step in step_folders(self.folder)}
        self._every, self._keep, self._keep_every, self._keep_best = every, keep, keep_every, keep_best
        on_first(lambda: _remove_unfinished(self.folder))
        _without_io_telemetry()
        training = ocp.training
        self._orbax = training.Checkpointer(
            self.folder,
            context=_context(),
            preservation_policy=self,
        )
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question, asked at each save: which of these stay."""
        scores = {one.step: self._scores.get(one.step) for one in checkpoints}
        staying = kept(scores, self._keep, self._keep_every, self._keep_best)
        return [one.step in staying for one in checkpoints]

    def is_best(self, score: float) -> bool:
        """Whether a step with this score would stay for it."""
        there = sorted(known for known in self._scores.values() if known is not None)
        return len(there[: self._keep_best]) < self._keep_best or any(score < one for one in there[: self._keep_best])

    def is_due(self, step: int) -> bool:
        """Whether ``every`` asks for this step."""
        return step % self._every == 0

    def save(self, step: int, items: Items, *, score: float | None = None) -> bool:
        """Start saving ``items``; return whether it was started: a step is saved once.

        The arrays are copied to the host before this returns, so they may be donated. One save is in flight at a time.
        ``score``: by which the best are kept; the less, the better.

        Raises:
            SaveFailed: this or the previous save, for example on a full disk.
        """
        if step == self._saved:
            return False
        self.wait()
        self._saved = step
        self._scores[step] = score
        needed = sum(map(int, exchange(str(_bytes_to_write(items)))))
        free = int(exchange(str(shutil.disk_usage(self.folder).free))[0])
        if needed > free:
            raise self._failed(step, f"the disk is full: {needed:,} bytes to write, {free:,} free")
        try:
            response = self._orbax.save_checkpointables_async(step, items, force=True)  # we decide
        except Exception as error:
            raise self._failed(step, _reason(error)) from error
        self._pending = self._background.submit(self._finish, step, response, array_shapes(items), score)
        return True

    def check(self) -> None:
        """Raise SaveFailed if a save failed in the background; cheap, called every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            SaveFailed: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save in flight and stop the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # raises a failed save again; wait() has raised it already
                self._orbax.close()

    def _finish(self, step: int, response: Any, shapes: Shapes, score: float | None) -> None:
        try:
            response.result()  # on process 0, only once every process has written its shards
            if jax.process_index() == 0:
                write_manifest(self.folder / str(step), shapes, self.extra | {SCORE: score})
        except Exception as error:
            raise self._failed(step, _reason(error)) from error

    def _failed(self, step: int, reason: str) -> "SaveFailed":
        self._scores.pop(step, None)
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)  # it may fill the disk
        older = [good for good in finished_steps(self.folder) if good < step]
        rest = f"it continues from step {older[-1]}" if older else "it starts again"
        what = f"{self.folder / str(step)}: the checkpoint could not be saved ({reason})"
        return SaveFailed(what, f"mend that and run the same command: {rest}")


def set_aside(folder: Path, after: int) -> None:
    """Move every step later than ``after`` to RUN_DIR/damaged, so that it can be saved again and nothing is lost."""
    for step in step_folders(folder):
        if step > after:
            target = folder.parent / "damaged" / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            (folder / str(step)).rename(target)


def load(folder: Path, step: int, abstract: Items) -> Items:
    """Read the items named in ``abstract`` from a step, each array straight into the sharding that ``abstract`` gives.

    A Grain iterator in ``abstract`` is set to the saved position. Floats of another type are converted
    (:mod:`gshardx.checkpoint.export` writes them).

    Raises:
        BadInput: names, shapes or dtypes differ from what was saved; lists the first few differences.
    """
    manifest = read_manifest(folder / str(step))
    assert manifest is not None, f"step {step} was not checked"
    _compare(folder / str(step), array_shapes(abstract), manifest)
    with _context():
        loaded: Items = ocp.load_checkpointables(folder.absolute() / str(step), abstract)
    return loaded


def finished_steps(folder: Path) -> list[int]:
    """Steps with a manifest, ascending; their files are not looked at."""
    return [step for step in step_folders(folder) if read_manifest(folder / str(step)) is not None]


def array_shapes(items: Items) -> Shapes:
    """Shape and dtype of every array of ``items`` by name."""
    shapes: Shapes = {}
    for item, tree in items.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if hasattr(leaf, "shape"):
                name = ".".join(
                    str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
                )
                shapes[f"{item}/{name}"] = (list(leaf.shape), str(leaf.dtype))
    return shapes


def _compare(step: Path, expected: Shapes, manifest: Manifest) -> None:
    items = {name.split("/")[0] for name in expected}
    found = {name: shape for name, shape in manifest.arrays.items() if name.split("/")[0] in items}
    lines = [
        f"{name}: model expects {expected.get(name, 'nothing')}, checkpoint has {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if not _suits(expected.get(name), found.get(name))
    ]
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise BadInput(f"{step}: {'; '.join(lines[:3])}{more}. Use the config that it was trained with")


def _suits(expected: tuple[list[int], str] | None, found: tuple[list[int], str] | None) -> bool:
    if expected is None or found is None:
        return False
    return expected == found or (expected[0] == found[0] and expected[1] in FLOATS and found[1] in FLOATS)


def _context() -> ocp.Context:
    context = ocp.Context()
    # With the default mode a folder whose commit file is gone is still listed and loaded.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    context.asynchronous.timeout_secs = _TIMEOUT_SECONDS
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False  # a float's low bits look random: little room won for much time
    context.array.saving.min_slice_bytes_for_replica_parallel = _SPLIT_REPLICAS_FROM
    return context


def _without_io_telemetry() -> None:
    """Orbax asks TensorStore for its counters twice an item, and what TensorStore (0.1.86) answers with is never freed:
    2.5 KB each, 5 % more memory after 10,000 steps with 500 saves of a tiny model (tests/train/test_soak.py)."""
    tensorstore_utils.get_tensorstore_raw_bytes = lambda direction: 0


def _reason(error: Exception) -> str:
    """One line; TensorStore's own is a page."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return "the disk is full"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _bytes_to_write(items: Items) -> int:
    """Disk space for this process's share of the arrays, before compression, in whole blocks, and for their metadata.

    Looked at before a save starts, because a write that fails halfway fills stderr with TensorStore's and asyncio's
    tracebacks.
    """
    arrays = [leaf for leaf in jax.tree.leaves(items) if isinstance(leaf, jax.Array)]
    shards = [shard.data.nbytes for a in arrays for shard in a.addressable_shards if shard.replica_id == 0]
    chunks = sum(-(-size // _BLOCK) * _BLOCK for size in shards)
    return chunks + len(arrays) * 2 * _BLOCK + len(items) * 8 * _BLOCK


def step_folders(folder: Path) -> list[int]:
    """Steps that have a folder, ascending, finished or not."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _remove_unfinished(folder: Path) -> None:
    """Delete what a killed save left: a folder that never got a manifest."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and not any(path.glob(NAME)):
                shutil.rmtree(path)
