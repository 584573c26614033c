"""MoE layers of public models: with the weights that transformers has, ours gives the output that transformers gives.

The numbers are in tests/oracles/huggingface.npz; tests/oracles/make_huggingface.py makes it and says what is in it.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from gshardx.layers import (
    Capacity,
    Einsum,
    Experts,
    FeedForward,
    GatedShared,
    Gather,
    MoE,
    Ragged,
    Shared,
    SigmoidBiasRouter,
    SwitchRouter,
    TopKRouter,
)
from gshardx.layers.balance import BalanceLoss, ZLoss
from gshardx.layers.shared import nothing

pytestmark = pytest.mark.slow

FIXTURE = Path(__file__).parent.parent / "oracles" / "huggingface.npz"
ARRAYS = dict(np.load(FIXTURE))
MASK = ARRAYS["mask"]
EVERYONE = np.ones_like(MASK)
DISPATCHERS = {"gather": Gather(), "einsum": Einsum(), "ragged": Ragged()}
WIDTH = 16
GATE, UP = 0, 1


# Our parameter: (transformers' name, how its axes become ours, which part where one tensor holds gate and up). A name
# with {} is a tensor for each expert.
Table = Mapping[str, tuple[str, str] | tuple[str, str, int]]

ROUTER: Table = {"router.kernel": ("gate.weight", "e m -> m e")}
EXPERTS: Table = {
    "experts.w_gate": ("experts.gate_up_proj", "e (part h) m -> part e m h", GATE),
    "experts.w_up": ("experts.gate_up_proj", "e (part h) m -> part e m h", UP),
    "experts.w_down": ("experts.down_proj", "e m h -> e h m"),
}


def shared_expert(name: str) -> Table:
    return {
        "beside.feed_forward.w_gate": (f"{name}.gate_proj.weight", "h m -> m h"),
        "beside.feed_forward.w_up": (f"{name}.up_proj.weight", "h m -> m h"),
        "beside.feed_forward.w_down": (f"{name}.down_proj.weight", "m h -> h m"),
    }


class Model(NamedTuple):
    """How a public model's layer is made of our parts."""

    router: Callable[..., Any]
    """From the options of its configuration, and our common options."""
    weights: Table
    state: Table = MappingProxyType({})
    hidden: str = "moe_intermediate_size"
    """The option that says how many hidden units an expert has."""
    activation: str = "swiglu"
    biases: bool = False
    beside: Callable[..., Any] = lambda options, rngs: nothing
    balance: BalanceLoss = BalanceLoss(choices="all", over="batch")


def softmax_router(options, **common):
    """Qwen's and OLMoE's."""
    experts, top_k = options["num_experts"], options["num_experts_per_tok"]
    return TopKRouter(WIDTH, experts, top_k, renormalise=options["norm_topk_prob"], **common)


def deepseek_router(kind, options, **more):
    scale = options["routed_scaling_factor"]
    return kind(WIDTH, options["n_routed_experts"], options["num_experts_per_tok"], scale=scale, **more)


def in_groups(options):
    return {"groups": options["n_group"], "groups_kept": options["topk_group"]}


def deepseek_shared(options, rngs):
    hidden = options["n_shared_experts"] * options["moe_intermediate_size"]
    return Shared(FeedForward(WIDTH, hidden, "swiglu", rngs=rngs))


MODELS = {
    "mixtral": Model(
        router=lambda o, **common: TopKRouter(WIDTH, o["num_local_experts"], o["num_experts_per_tok"], **common),
        hidden="intermediate_size",
        weights={**ROUTER, **EXPERTS},
    ),
    "qwen2_moe": Model(
        router=softmax_router,
        beside=lambda o, rngs: GatedShared(
            WIDTH, FeedForward(WIDTH, o["shared_expert_intermediate_size"], "swiglu", rngs=rngs), rngs=rngs
        ),
        weights={
            **ROUTER,
            **EXPERTS,
            **shared_expert("shared_expert"),
            "beside.gate": ("shared_expert_gate.weight", "1 m -> m"),
        },
    ),
    "qwen3_moe": Model(
        router=softmax_router,
        weights={**ROUTER, **EXPERTS},
    ),
    "olmoe": Model(
        router=softmax_router,
        hidden="intermediate_size",
        weights={**ROUTER, **EXPERTS},
    ),
    "deepseek_v2_greedy": Model(
        router=lambda o, **common: deepseek_router(TopKRouter, o, renormalise=False, **common),
        beside=deepseek_shared,
        weights={**ROUTER, **EXPERTS, **shared_expert("shared_experts")},
    ),
    "deepseek_v2_groups": Model(
        router=lambda o, **common: deepseek_router(TopKRouter, o, renormalise=False, **in_groups(o), **common),
        beside=deepseek_shared,
        weights={**ROUTER, **EXPERTS, **shared_expert("shared_experts")},
    ),
    "deepseek_v3": Model(
        router=lambda o, **common: deepseek_router(
            SigmoidBiasRouter, o, renormalise=o["norm_topk_prob"], **in_groups(o), **common
        ),
        beside=deepseek_shared,
        weights={**ROUTER, **EXPERTS, **shared_expert("shared_experts")},
        state={"bias": ("gate.e_score_correction_bias", "e -> e")},
    ),
    "gpt_oss": Model(
        router=lambda o, **common: TopKRouter(
            WIDTH, o["num_local_experts"], o["num_experts_per_tok"], softmax="after", bias=True, **common
        ),
        hidden="intermediate_size",
        activation="clamped_swiglu",
        biases=True,
        weights={
            "router.kernel": ("router.weight", "e m -> m e"),
            "router.bias": ("router.bias", "e -> e"),
            "experts.w_gate": ("experts.gate_up_proj", "e m (h part) -> part e m h", GATE),
            "experts.w_up": ("experts.gate_up_proj", "e m (h part) -> part e m h", UP),
            "experts.w_down": ("experts.down_proj", "e h m -> e h m"),
            "experts.b_gate": ("experts.gate_up_proj_bias", "e (h part) -> part e h", GATE),
            "experts.b_up": ("experts.gate_up_proj_bias", "e (h part) -> part e h", UP),
            "experts.b_down": ("experts.down_proj_bias", "e m -> e m"),
        },
    ),
    "granite_moe": Model(
        router=lambda o, **common: TopKRouter(
            WIDTH, o["num_local_experts"], o["num_experts_per_tok"], softmax="after", **common
        ),
        hidden="intermediate_size",
        weights={"router.kernel": ("router.weight", "e m -> m e"), **EXPERTS},
    ),
    "llama4": Model(
        router=lambda o, **common: SigmoidBiasRouter(
            WIDTH, o["num_local_experts"], o["num_experts_per_tok"], renormalise=False, weigh="input", **common
        ),
        hidden="intermediate_size",
        beside=lambda o, rngs: Shared(FeedForward(WIDTH, o["intermediate_size"], "swiglu", rngs=rngs)),
        weights={
            "router.kernel": ("router.weight", "e m -> m e"),
            "experts.w_gate": ("experts.gate_up_proj", "e m (part h) -> part e m h", GATE),
            "experts.w_up": ("experts.gate_up_proj", "e m (part h) -> part e m h", UP),
            "experts.w_down": ("experts.down_proj", "e h m -> e h m"),
            **shared_expert("shared_expert"),
        },
    ),
    "switch": Model(
        router=lambda o, **common: SwitchRouter(
            WIDTH,
            o["num_experts"],
            capacity=Capacity(evaluation=o["expert_capacity"] * o["num_experts"] / MASK.shape[1]),
            **common,
        ),
        hidden="d_ff",
        activation="relu",
        weights={
            "router.kernel": ("router.classifier.weight", "e m -> m e"),
            "experts.w_up": ("experts.expert_{}.wi.weight", "e h m -> e m h"),
            "experts.w_down": ("experts.expert_{}.wo.weight", "e m h -> e h m"),
        },
        balance=BalanceLoss(choices="first", over="group"),
    ),
}


def theirs(model: str, what: str) -> Any:
    return ARRAYS[f"{model}/{what}"]


def options_of(model: str) -> dict[str, Any]:
    return json.loads(str(theirs(model, "options")))


def in_our_layout(model: str, table: Table, num_experts: int) -> tuple[dict[str, np.ndarray], set[str]]:
    """The weights of a table by our names, and the names of those that were read."""
    ours, read = {}, set()
    for name, (source, axes, *part) in table.items():
        names = [source.format(e) for e in range(num_experts)] if "{}" in source else [source]
        read.update(names)
        tensors = [theirs(model, f"weights/{one}") for one in names]
        value = rearrange(tensors if "{}" in source else tensors[0], axes, **({"part": 2} if part else {}))
        ours[name] = value[part[0]] if part else value
    return ours, read


@cache
def layer(model: str) -> Callable[[np.ndarray], Any]:
    """The model's layer with its weights: ``valid -> {dispatcher: (output, metrics)}`` on the recorded input."""
    recipe, options = MODELS[model], options_of(model)

    def empty():
        rngs = nnx.Rngs(0)
        router = recipe.router(options, losses={"balance": recipe.balance, "z": ZLoss()}, rngs=rngs)
        hidden = options[recipe.hidden]
        experts = Experts(router.num_experts, WIDTH, hidden, recipe.activation, biases=recipe.biases, rngs=rngs)
        return MoE(router, Gather(), experts, recipe.beside(options, rngs))

    moe = nnx.eval_shape(empty)
    weights, read = in_our_layout(model, recipe.weights, moe.router.num_experts)
    for name, value in weights.items():
        param = attrgetter(name)(moe)
        assert param.shape == value.shape, name
        param.set_value(jnp.asarray(value))
    state = moe.router.initial_state()
    if recipe.state:
        values, also_read = in_our_layout(model, recipe.state, moe.router.num_experts)
        state, read = state._replace(**values), read | also_read
    assert {f"{model}/weights/{name}" for name in read} == {n for n in ARRAYS if n.startswith(f"{model}/weights/")}
    graph, params = nnx.split(moe)

    def every_dispatcher(params, x, valid, state):
        results = {}
        for name, dispatcher in DISPATCHERS.items():
            moe = nnx.merge(graph, params)
            moe.dispatcher = dispatcher
            results[name] = moe(x, valid, None, state)
        return results

    # Compiling is nearly all of the time here, and unoptimised code takes half of it.
    run = jax.jit(every_dispatcher, compiler_options={"xla_backend_optimization_level": 0})
    return lambda valid: run(params, theirs(model, "input"), valid, state)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("model", MODELS)
def test_our_layer_gives_what_transformers_gives(model, dispatcher):
    out, metrics = layer(model)(EVERYONE)[dispatcher]
    chosen = np.sort(metrics.experts, axis=-1).reshape(theirs(model, "experts").shape)
    np.testing.assert_array_equal(chosen, theirs(model, "experts"))
    assert np.abs(out - theirs(model, "output")).max() < 1e-5
    assert float(metrics.stats.dropped.sum()) == ARRAYS.get(f"{model}/dropped", 0)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("model", MODELS)
def test_padding_behind_a_sequence_changes_no_real_token(model, dispatcher):
    out, _ = layer(model)(MASK)[dispatcher]
    assert np.abs(out - theirs(model, "output"))[MASK].max() < 1e-5


@pytest.mark.parametrize("model", [m for m in MODELS if f"{m}/balance" in ARRAYS])
def test_our_balance_loss_times_k_is_that_of_transformers(model):
    k = theirs(model, "experts").shape[-1]
    _, metrics = layer(model)(EVERYONE)["gather"]
    assert float(metrics.losses["balance"]) * k == pytest.approx(float(theirs(model, "balance")), rel=1e-5)
    if f"{model}/balance_masked" in ARRAYS:
        _, metrics = layer(model)(MASK)["gather"]
        assert float(metrics.losses["balance"]) * k == pytest.approx(float(theirs(model, "balance_masked")), rel=1e-5)


def test_our_z_loss_is_that_of_transformers():
    _, metrics = layer("switch")(EVERYONE)["gather"]
    assert float(metrics.losses["z"]) == pytest.approx(float(theirs("switch", "z")), rel=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_recorded_tokens_use_more_than_half_of_the_experts(model):
    experts, num_experts = theirs(model, "experts"), theirs(model, "logits").shape[-1]
    assert len(np.unique(experts)) > num_experts / 2
    assert len(np.unique(experts, axis=0)) > 1


def test_switch_dropped_some_of_the_recorded_tokens():
    assert 0 < theirs("switch", "dropped") < MASK.size / 2


def test_groups_and_bias_changed_some_recorded_choices():
    def best(scores, k):
        return np.sort(np.argsort(-scores)[:, :k])

    for model in ("deepseek_v2_groups", "deepseek_v3"):
        experts, logits = theirs(model, "experts"), theirs(model, "logits")
        scores = 1 / (1 + np.exp(-logits))
        assert (best(scores, experts.shape[-1]) != experts).any()
    biased = scores + theirs("deepseek_v3", "weights/gate.e_score_correction_bias")
    assert (best(biased, experts.shape[-1]) != best(scores, experts.shape[-1])).any()
    assert (best(biased, experts.shape[-1]) != experts).any()


def test_gpt_oss_reached_both_clamps():
    tokens, experts = theirs("gpt_oss", "input").reshape(-1, WIDTH), theirs("gpt_oss", "experts")
    w, b = (theirs("gpt_oss", f"weights/experts.gate_up_proj{end}") for end in ("", "_bias"))
    hidden = np.take_along_axis(np.einsum("nm,emh->neh", tokens, w) + b, experts[..., None], axis=1)
    gate, up = hidden[..., ::2], hidden[..., 1::2]
    assert gate.max() > 7
    assert up.max() > 7
    assert up.min() < -7


def test_transformers_still_gives_what_was_recorded(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.oracles.make_huggingface import main

    main(tmp_path / "again.npz")
    again = dict(np.load(tmp_path / "again.npz"))
    assert again.keys() == ARRAYS.keys()
    versions = f"recorded with {ARRAYS['transformers']}, now {transformers.__version__}"
    for name in ARRAYS.keys() - {"transformers"}:
        if ARRAYS[name].dtype == np.float32:
            np.testing.assert_allclose(again[name], ARRAYS[name], atol=1e-5, err_msg=f"{name}: {versions}")
        else:
            np.testing.assert_array_equal(again[name], ARRAYS[name], err_msg=f"{name}: {versions}")
