"""What a model makes of some tokens, layer by layer: ours, and transformers' of the same files."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.checkpoint.arrays import get
from gshardx.convert.model import Model
from gshardx.convert.rewrite import open_run
from gshardx.convert.surgery import sparse_layers
from gshardx.errors import BadInput
from gshardx.layers import Layers, Packed
from gshardx.models.build import Blueprint, Variables, blueprint
from gshardx.sharding import MeshConfig, build_mesh

PACKAGES = "pip install 'gshardx[hf]' torch"

ROUTERS = r"layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)"
"""Names that end so are routers in transformers' models."""
CHOICES: Mapping[str, Callable[[Any], Any]] = {
    # Scores of all experts, of which those that are not chosen are 0.
    "llama4_text": lambda out: (out[0] > 0).nonzero()[:, 1].reshape(len(out[0]), -1),
}
"""By model_type, a token's experts [n, k] in what its router returns, where that isn't (logits, weights, experts)."""


class Trace(NamedTuple):
    """Of n tokens in rows; all fp32.

    Attributes:
        logits: scores of the next token.
        hidden: the embedding, then what each layer adds up to.
        experts: what each layer's tokens chose, ascending, by the number of the layer; none of dense models.
    """

    logits: Float[np.ndarray, "b t v"]
    hidden: list[Float[np.ndarray, "b t m"]]
    experts: dict[int, Int[np.ndarray, "b t k"]]


class Loaded(NamedTuple):
    """A model of ours on one device, computing in fp32."""

    plan: Blueprint
    variables: Variables


def load_ours(folder: Path, step: int | None = None) -> Loaded:
    """A run's weights, without its tokenizer, or those of a directory in the hub's layout.

    Raises:
        BadInput: see :func:`gshardx.convert.rewrite.open_run` and :meth:`Model.from_pretrained`.
    """
    if not (folder / "config.yaml").is_file():
        public = Model.from_pretrained(folder, dtype="float32")
        return Loaded(public.plan, public.variables)
    given = open_run(folder, step)
    model = dataclasses.replace(given.config.model, dtype="float32")
    plan = blueprint(model, given.vocab, build_mesh(MeshConfig()))

    def leaf(path: tuple[Any, ...], about: jax.ShapeDtypeStruct) -> Array:
        name = ".".join(str(key.key) for key in path)
        return jnp.asarray(get(given.saved.folder / given.item, name, ()), about.dtype)

    params = jax.tree.map_with_path(leaf, plan.params)
    leaves, kind = jax.tree.flatten(plan.router)
    state = jax.tree.unflatten(kind, [jnp.asarray(given.state(str(number))) for number in range(len(leaves))])
    return Loaded(plan, Variables(params, state))


def trace_ours(loaded: Loaded, tokens: Int[np.ndarray, "b t"]) -> Trace:
    """``loaded`` is used up: each layer gets arrays of its own, and the stacked ones go."""
    config = loaded.plan.config
    plan = blueprint(config, loaded.plan.vocab, build_mesh(MeshConfig()), stack=Layers)
    params = _apart(dict(loaded.variables.params), config.moe_layers)

    @jax.jit
    def forward(params: Any, state: Any, tokens: Array) -> tuple[Array, list[Array], Array]:
        model: Any = plan.bind(params)
        seen: list[Array] = []
        blocks = [*model.first, *(one for unit in model.stack.separate for one in (*unit.dense, unit.sparse))]
        for block in blocks:
            block.attention_norm = Noting(block.attention_norm, seen)
        model.final_norm = Noting(model.final_norm, seen)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        ones = jnp.ones_like(tokens)
        hidden, _, metrics = model.hidden(tokens, places, ones > 0, Packed.of(ones), None, state)
        return model.logits(hidden), seen, metrics.experts

    logits, hidden, experts = forward(params, loaded.variables.router, jnp.asarray(tokens, jnp.int32))
    chosen = np.sort(np.asarray(experts), axis=-1)
    routed = sparse_layers(config) if config.moe.num_experts > 1 else []
    return Trace(np.asarray(logits), [np.asarray(one) for one in hidden], dict(zip(routed, chosen, strict=False)))


class Noting(nnx.Module):
    """A module of one argument and more; what that is given is appended to ``seen``."""

    def __init__(self, inner: nnx.Module, seen: list[Array]) -> None:
        self.inner, self._note = inner, seen.append

    def __call__(self, x: Array, *more: Any) -> Any:
        self._note(x)
        return self.inner(x, *more)  # type: ignore[operator]


def _apart(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Each unit's arrays by its number, in the memory that the stacked ones took."""
    leaves, kind = jax.tree.flatten(params.pop("stack")["units"])
    sliced: list[list[Array]] = []
    while leaves:
        leaf = leaves.pop(0)
        sliced.append([leaf[number] for number in range(count)])
    units = {number: jax.tree.unflatten(kind, [own[number] for own in sliced]) for number in range(count)}
    return {**params, "stack": {"separate": units}}


def load_theirs(folder: Path) -> Any:
    """transformers' model of a directory in the hub's layout: fp32, on the CPU, attention and experts written out.

    Raises:
        BadInput: the packages are missing, or transformers has no such architecture or can't read the files.
    """
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32",
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{folder}: transformers {transformers.__version__} can't load it ({reason})") from error
    return model.eval()


def import_transformers() -> Any:
    """Raises:
    BadInput: it is missing, or torch is.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise BadInput(f"--verify runs transformers beside ours, and {error.name} is not here; {PACKAGES}") from error
    return transformers


def trace_theirs(model: Any, tokens: Int[np.ndarray, "b t"]) -> Trace:
    """A causal language model of transformers, in eval mode and fp32."""
    import torch

    hidden: list[Any] = []
    experts: dict[int, Any] = {}
    choice = CHOICES.get(model.config.model_type, lambda out: out[2])

    def note_experts(layer: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, given, out: experts.update({layer: choice(out)})

    layers = [module for name, module in model.named_modules() if re.fullmatch(r"model\.layers\.\d+", name)]
    hooks = [layers[0].register_forward_pre_hook(lambda module, given: hidden.append(given[0]))]
    hooks += [one.register_forward_hook(lambda module, given, out: hidden.append(_first(out))) for one in layers]
    for name, module in model.named_modules():
        if found := re.search(ROUTERS + "$", name):
            hooks.append(module.register_forward_hook(note_experts(int(found[1]))))
    try:
        with torch.no_grad():
            logits = model(torch.from_numpy(np.asarray(tokens)).long(), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    chosen = {layer: np.sort(one.numpy().reshape(*tokens.shape, -1), axis=-1) for layer, one in experts.items()}
    return Trace(logits.numpy(), [one.numpy() for one in hidden], chosen)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out
