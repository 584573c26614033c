"""Where every parameter lives, as a table: ``print(describe(model))``; and how one of them is cut, as a drawing."""

import dataclasses
import io
import math
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gshardx.errors import BadInput
from gshardx.sharding.axes import Entry, nearest, variable_axes, variable_spec, written

_PIECES_DRAWN = 8
_BAR = 48
"""Characters of a dimension's bar."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: its path, joined by dots.
        shape: of the whole.
        dtype: its name.
        axes: logical names and mesh axes it was annotated with, one a dimension; () where none are known.
        spec: mesh axes, or None where the place is not a mesh's (one device, or XLA's own description).
        shard_shape: of the piece that one device holds.
        mesh_shape: size of each mesh axis; empty without a mesh.
        bytes_per_device: of one piece.
        total_bytes: of the whole, once, without copies.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[Entry, ...]
    spec: PartitionSpec | None
    shard_shape: tuple[int, ...]
    mesh_shape: dict[str, int]
    bytes_per_device: int
    total_bytes: int

    @property
    def pieces(self) -> tuple[int, ...]:
        """Into how many each dimension is cut."""
        return tuple(-(-size // max(piece, 1)) for size, piece in zip(self.shape, self.shard_shape, strict=True))

    @property
    def names(self) -> str:
        """Logical names as they were written; empty where the annotation has none."""
        return written(self.axes) if any(isinstance(entry, str) for entry in self.axes) else ""

    @property
    def layout(self) -> str:
        """``expert, -, fsdp*tensor``: mesh axes of several devices, one entry a dimension; or ``whole``."""
        if math.prod(self.pieces) == 1:
            return "whole"
        if self.spec is None:
            return " x ".join(map(str, self.pieces)) + " pieces"
        return ", ".join("*".join(self.mesh_axes(dimension)) or "-" for dimension in range(len(self.shape)))

    def as_json(self) -> dict[str, Any]:
        """What the table shows."""
        facts = ("name", "shape", "dtype", "layout", "bytes_per_device", "total_bytes")
        return {fact: getattr(self, fact) for fact in facts}

    def mesh_axes(self, dimension: int) -> tuple[str, ...]:
        """Mesh axes of several devices that cut a dimension."""
        entry = self.spec[dimension] if self.spec is not None and dimension < len(self.spec) else None
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        return tuple(axis for axis in axes if self.mesh_shape.get(axis, 1) > 1)


@dataclasses.dataclass(frozen=True)
class Description:
    """The table of :func:`describe`. ``str`` is plain text, ``rich.print`` colours it."""

    rows: tuple[Row, ...]

    @property
    def total_bytes(self) -> int:
        """Of all parameters, once."""
        return sum(row.total_bytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Of all parameters' pieces on one device."""
        return sum(row.bytes_per_device for row in self.rows)

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(row.shape) for row in self.rows)

    def draw(self, name: str) -> str:
        """How a parameter is cut: a bar a dimension, its pieces labelled with their size; any rank.

        Raises:
            BadInput: there is no parameter ``name``.
        """
        found = {row.name: row for row in self.rows}
        if name not in found:
            known = f"did you mean {nearest(name, found)!r}?" if found else "there are none"
            raise BadInput(f"draw: no parameter {name!r}; {known}")
        return "\n".join(_drawing(found[name]))

    def __rich__(self) -> Table:
        named = any(row.names for row in self.rows)
        table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True, footer_style="bold")
        table.add_column("param", Text(f"{len(self.rows)} params"), overflow="fold")
        table.add_column("shape", Text(f"{self.parameters:,} numbers"))
        table.add_column("dtype")
        if named:
            table.add_column("axes", style="cyan")
        table.add_column("spec", style="green")
        table.add_column("bytes per device", f"{self.bytes_per_device:,}", justify="right")
        table.add_column("total", f"{self.total_bytes:,}", justify="right", no_wrap=True)
        for row in self.rows:
            cells = [row.name, str(list(row.shape)), row.dtype, *([row.names] if named else []), row.layout]
            table.add_row(*map(Text, cells), f"{row.bytes_per_device:,}", f"{row.total_bytes:,}")
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=100_000, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def describe(model: Any, mesh: Mesh | AbstractMesh | None = None) -> Description:
    """Say where parameters live and what they weigh on each device.

    Args:
        model: an ``nnx.Module`` (its Params are shown), or any pytree of Variables, arrays or ShapeDtypeStructs;
            values or shapes only.
        mesh: what Variables' annotations are translated for: the layout that they would have there. None shows where
            arrays are, and annotations on the mesh of ``jax.set_mesh``. What has neither is one whole.

    Raises:
        BadInput: an annotation does not fit the mesh.
    """
    tree = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    return Description(tuple(_rows(leaves, mesh)))


def _rows(leaves: list[tuple[Any, Any]], mesh: Mesh | AbstractMesh | None) -> Iterator[Row]:
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        variable = leaf if isinstance(leaf, nnx.Variable) else None
        value = leaf if variable is None else variable.get_value()
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise BadInput(f"describe: {name or 'the tree'} is a {type(value).__name__}; give arrays or their shapes")
        annotated = variable is not None and {"axes", "out_sharding"} & variable.get_metadata().keys()
        axes = variable_axes(variable, name) if variable is not None and annotated else ()
        yield _row(name, value, axes, _sharding(variable if annotated else None, value, mesh, name))


def _sharding(
    variable: nnx.Variable[Any] | None, value: Any, mesh: Mesh | AbstractMesh | None, name: str
) -> jax.sharding.Sharding | None:
    """The asked mesh's, else the value's own over several devices, else the context's; None: one whole."""
    placed = getattr(value, "sharding", None)
    if mesh is None and isinstance(placed, jax.sharding.Sharding) and placed.num_devices > 1:
        return placed
    target = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if variable is None or target.empty:
        return placed if isinstance(placed, jax.sharding.Sharding) else None
    return NamedSharding(target, variable_spec(variable, target, name))


def _row(name: str, value: Any, axes: tuple[Entry, ...], sharding: jax.sharding.Sharding | None) -> Row:
    shape = tuple(value.shape)
    piece = shape if sharding is None else tuple(sharding.shard_shape(shape))
    named = sharding if isinstance(sharding, NamedSharding) else None
    return Row(
        name=name,
        shape=shape,
        dtype=str(value.dtype),
        axes=axes,
        spec=None if named is None else named.spec,
        shard_shape=piece,
        mesh_shape={} if named is None else dict(named.mesh.shape),
        bytes_per_device=math.prod(piece) * value.dtype.itemsize,
        total_bytes=math.prod(shape) * value.dtype.itemsize,
    )


def _drawing(row: Row) -> Iterator[str]:
    yield f"{row.name} {list(row.shape)} {row.dtype}: {row.bytes_per_device:,} of {row.total_bytes:,} bytes a device"
    labels = [e if isinstance(e, str) else "" for e in row.axes] or [""] * len(row.shape)
    width = max(map(len, labels), default=0)
    for dimension, (size, piece, pieces) in enumerate(zip(row.shape, row.shard_shape, row.pieces, strict=True)):
        axes = " x ".join(f"{axis} {row.mesh_shape[axis]}" for axis in row.mesh_axes(dimension))
        how = f"{pieces} pieces of {piece}" + (f" along {axes}" if axes else "") if pieces > 1 else "whole"
        yield f"  {dimension} {labels[dimension]:<{width}} {_bar(size, piece, pieces)} {how}"
    cutting = {axis for dimension in range(len(row.shape)) for axis in row.mesh_axes(dimension)}
    rest = {axis: n for axis, n in row.mesh_shape.items() if n > 1 and axis not in cutting}
    if rest:
        along = " x ".join(f"{axis} {n}" for axis, n in rest.items())
        yield f"  each piece is on {math.prod(rest.values())} devices, along {along}"


def _bar(size: int, piece: int, pieces: int) -> str:
    """``| 4 | 4 | ... | 4 |``: the pieces of one dimension, the middle left out where they are many."""
    many = pieces > _PIECES_DRAWN
    cells = (
        [*[str(piece)] * (_PIECES_DRAWN - 2), "...", str(size - piece * (pieces - 1))]
        if many
        else [str(piece)] * pieces
    )
    cell = max(_BAR // len(cells) - 1, len(str(piece)))
    return "|" + "|".join(text.center(cell) for text in cells) + "|"
