"""A public model on a mesh, without a run directory: the library's side of ``python -m gshardx.convert``."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gshardx.checkpoint.beside import written_beside
from gshardx.config import ModelConfig, check_model_on_mesh
from gshardx.convert.hub import fetched
from gshardx.convert.outgoing import LARGEST, Form, write_model
from gshardx.convert.rules import STATE, Leaf, Piece
from gshardx.convert.source import Layout, Source, layout_of, open_source
from gshardx.layers import MoEMetrics, Packed
from gshardx.models.build import Blueprint, Params, Variables
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.sharding.distributed import fetch


@dataclasses.dataclass(frozen=True)
class Model:
    """``variables`` are on ``mesh``, and ``plan`` binds them to a module; ``form`` is what it came as."""

    form: Form
    plan: Blueprint
    variables: Variables
    mesh: Mesh

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        mesh_config: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
        dtype: Literal["float32", "bfloat16"] | None = None,
        revision: str | None = None,
    ) -> "Model":
        """Read a directory in the hub's layout; each device gets its shards, one tensor at a time in the host's memory.

        Args:
            folder: with config.json and safetensors files; or a model's id on the hub, ``org/name[@revision]``.
            mesh_config: where the model is to be.
            dtype: to compute in; None: what config.json says. Parameters are float32, as everywhere here.
            revision: on the hub.

        Raises:
            BadInput: see :mod:`gshardx.convert.source` and :func:`gshardx.convert.hub.fetched`; or the model does not
                divide over the mesh.
        """
        source = open_source(fetched(folder, revision))
        if dtype is not None:
            source = dataclasses.replace(source, model=dataclasses.replace(source.model, dtype=dtype))
        check_model_on_mesh(source.model, mesh_config)
        mesh = build_mesh(mesh_config)
        layout = source.layout(mesh)
        return cls(Form(source.family, source.config, source.after), layout.plan, _placed(source, layout), mesh)

    @property
    def config(self) -> ModelConfig:
        return self.plan.config

    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t v"], MoEMetrics]:
        """Logits of whole sequences, fp32, and each layer's routing; b divides over the mesh's batch axes."""
        with jax.set_mesh(self.mesh):
            return self._forward(self.variables, jnp.asarray(tokens, jnp.int32))

    def _forward(self, variables: Variables, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t v"], MoEMetrics]:
        def forward(variables: Variables, tokens: Array) -> tuple[Array, MoEMetrics]:
            model = self.plan.bind(variables.params)
            ones = jnp.ones_like(tokens)
            places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            hidden, _, metrics = model.hidden(tokens, places, ones > 0, Packed.of(ones), None, variables.router)
            return model.logits(hidden), metrics

        return jax.jit(forward)(variables, tokens)

    def save_pretrained(self, folder: str | Path, dtype: str | None = None, largest: int = LARGEST) -> None:
        """Write the hub's layout; the inverse. Tokenizer files are where the model came from.

        Args:
            folder: a directory that is empty or not there.
            dtype: of all tensors; None: float32, as the parameters are.
            largest: bytes of a file.

        Raises:
            BadInput: it can't be written.
        """
        layout = layout_of(self.form.family, self.config, self.plan.vocab, self.mesh)
        own = dict.fromkeys(layout.shapes, "float32")
        with written_beside(Path(folder), "save_pretrained", "saves to it") as part:
            write_model(part, self.form, layout, own, dtype, largest, self._value)

    def _value(self, leaf: Leaf) -> np.ndarray:
        if leaf.name.startswith(STATE):
            return fetch(jax.tree.leaves(self.variables.router)[int(leaf.name.removeprefix(STATE))][leaf.at])
        value: Any = self.variables.params
        for key in leaf.name.split("."):
            value = value[int(key) if key.isdecimal() else key]
        return fetch(value[leaf.at])


def _placed(source: Source, layout: Layout) -> Variables:
    """Every parameter and the routers' state, in their shards."""
    held: dict[Leaf, Piece] = {leaf: piece for piece in layout.pieces for leaf in piece.leaves}
    ranks = {leaf.name: len(leaf.at) for leaf in held}

    def place(name: str, about: jax.ShapeDtypeStruct) -> Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            spans = [range(*one.indices(size)) for one, size in zip(index, about.shape, strict=True)]
            out = np.zeros([len(span) for span in spans], about.dtype)
            front = ranks.get(name)
            if front is not None:  # else there is no tensor for it, and it is zero
                for at in np.ndindex(*out.shape[:front]):
                    leaf = Leaf(name, tuple(span[i] for span, i in zip(spans, at, strict=False)))
                    out[at] = source.read(held[leaf])[leaf][index[front:]]
            return out

        assert about.sharding is not None
        return jax.make_array_from_callback(about.shape, about.sharding, shard)

    params: Params = jax.tree.map_with_path(
        lambda path, about: place(".".join(str(key.key) for key in path), about), layout.plan.params
    )
    leaves, structure = jax.tree.flatten(layout.plan.router)
    state = [place(f"{STATE}{number}", leaf) for number, leaf in enumerate(leaves)]
    return Variables(params, jax.tree.unflatten(structure, state))
