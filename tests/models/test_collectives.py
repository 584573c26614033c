"""What every step of the decoder sends on every mesh: its budget and no more. Planted mistakes break it."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from gshardx.config import (
    Config,
    DataConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    check_model_on_mesh,
)
from gshardx.errors import BadInput
from gshardx.layers import KVCache
from gshardx.models.budget import step_budget
from gshardx.models.generator import compile_decode, compile_prefill
from gshardx.sharding import RULES, CompiledStep, MeshConfig, abstract_array, build_mesh, manual, shard, totals
from gshardx.train.job import Job
from gshardx.train.optimizer import build_optimizer
from tests.models.conftest import INVOLUNTARY
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, model

CHUNK = 8
STEPS = ("train", "forward", "prefill", "decode")
REDUCED_OVER_TENSOR = ("all-reduce", ("tensor",))


def fits(mesh_config):
    try:
        check_model_on_mesh(model(), mesh_config, ROWS)
    except BadInput:
        return False
    return ROWS % mesh_config.batch_shards == 0


PRODUCTS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
MESHES = [mesh for mesh in itertools.starmap(MeshConfig, PRODUCTS) if fits(mesh)]
FAST = [MeshConfig(expert=8), MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(fsdp=2, expert=2, tensor=2)]


def compiled(step, model_config, mesh_config, zero_stage=3, micro=1):
    """The compiled step, and its budget."""
    config = Config(
        model=model_config,
        mesh=mesh_config,
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(batch_size=ROWS * micro, zero_stage=zero_stage, accumulation_steps=micro),
    )
    job = Job.of(config, VOCAB)
    plan, mesh = job.blueprint, job.mesh
    if step == "prefill":
        program, tokens = compile_prefill(plan, mesh, length=LENGTH, rows=ROWS, chunk=CHUNK), CHUNK
    elif step == "decode":
        program, tokens = compile_decode(plan, mesh, length=LENGTH, rows=ROWS), 1
    else:
        program, tokens = job.train_step if step == "train" else job.eval_step, LENGTH
    rows = ROWS * micro if step == "train" else ROWS
    return program, step_budget(plan, mesh, step, rows=rows, tokens=tokens, split=job.split, micro=micro)


def breaches(*args, **options):
    program, budget = compiled(*args, **options)
    return budget.breaches(program.collectives)


def sent(program, op, axis="expert"):
    """Count and bytes of one operation over one axis."""
    return next(((one.count, one.bytes_per_device) for one in totals(program.collectives)
                 if (one.op, one.axes) == (op, (axis,))), (0, 0))  # fmt: skip


def test_the_meshes_are_all_that_the_model_divides_over():
    assert len(PRODUCTS) == 20
    assert {sizes for sizes in PRODUCTS if sizes[3] <= 2} == {tuple(mesh.shape.values()) for mesh in MESHES}
    assert set(FAST) <= set(MESHES)


def tier(mesh_config, step):
    if mesh_config == FAST[0]:
        return []
    return pytest.mark.slow if mesh_config in FAST and step != "train" else pytest.mark.sweep


@pytest.mark.parametrize(
    ("mesh_config", "step"),
    [
        pytest.param(mesh, step, marks=tier(mesh, step))
        for mesh, step in itertools.product(MESHES, STEPS)
        if mesh in FAST or step == "forward"
    ],
    ids=str,
)
def test_every_step_keeps_to_its_budget_on_every_mesh(mesh_config, step, compiling_anew, capfd):
    """Those that ``test_equality`` runs on every mesh are looked at there."""
    assert breaches(step, model(), mesh_config) == []
    assert INVOLUNTARY not in capfd.readouterr().err


def test_the_compilers_log_is_seen(compiling_anew, capfd):
    mesh = build_mesh(MeshConfig(data=2, expert=2, tensor=2))

    def moved(x):
        x = jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec("data", None))
        return jax.lax.with_sharding_constraint(jnp.sin(x), PartitionSpec(None, ("expert", "tensor")))

    CompiledStep(moved, (abstract_array((16, 16), jnp.float32, ("time", "model"), mesh),), mesh)
    assert INVOLUNTARY in capfd.readouterr().err


@pytest.mark.parametrize("losses", [{"balance": 0.01}, {"balance": 0.01, "batch": 0.01}], ids=str)
@pytest.mark.parametrize(
    "mesh_config", [FAST[0], *(pytest.param(m, marks=pytest.mark.sweep) for m in FAST[1:])], ids=str
)
@pytest.mark.slow
def test_micro_batches_send_as_often_and_a_first_pass_once_more(mesh_config, losses):
    options = {"router": "top_k", "losses": losses}
    program, budget = compiled("train", model(**options), mesh_config, micro=2)
    assert budget.breaches(program.collectives) == []
    one = compiled("train", model(**options), mesh_config)[0]
    passes = 3 if "batch" in losses else 2
    assert sent(program, "all-to-all")[0] * 2 == sent(one, "all-to-all")[0] * 2 * passes


@pytest.mark.sweep
def test_to_count_the_tokens_that_are_not_dropped_micro_batches_send_nothing():
    options = {"router": "top_k", "router_options": {"token_drop": 0.1}}
    program, budget = compiled("train", model(**options), MeshConfig(data=2, expert=4), micro=2)
    assert budget.breaches(program.collectives) == []


@pytest.mark.sweep
@pytest.mark.parametrize("step", ["train", "forward"])
@pytest.mark.parametrize(
    "options",
    [
        {"router": "switch", "top_k": 1, "capacity_factor": 2.5},
        {"router": "top_k", "router_options": {"groups": 4, "groups_kept": 2, "priority": "gate"}},
        {"router": "sigmoid_bias", "router_options": {"groups": 4, "groups_kept": 2}, "adaptive_balance": True},
        {"router": "dynmoe", "top_k": 4, "losses": {"balance": 0.01, "diversity": 0.01}},
        {"router": "adamoe", "top_k": 4, "losses": {"balance": 0.01, "batch": 0.01}},
        {"router": "cosine", "router_options": {"projection": 16}},
        {"router": "smoe_dropout", "top_k": 3, "router_options": {"serve": 2}},
        {"router": "ds_moe", "losses": {"mutual_information": 0.1}},
        {"router": "dselect_k", "losses": {"balance": 0.01, "selector_entropy": 0.1}},
        {"router": "relu", "router_options": {"most": 3}, "losses": {"balance": 0.01, "sparsity": 1.0}},
        {"router": "noisy_top_k", "losses": {"importance": 0.1, "load": 0.1}},
        {"router": "expert_choice"},
        {"router": "hash"},
        {"router": "base", "top_k": 1, "capacity_factor": 1.0},
        {"router": "sinkhorn"},
        {"router": "quantile"},
        {"router": "sentence"},
        {"router": "task", "router_options": {"tags": [1, 2, 3]}},
        {"router": "demix", "top_k": 1, "router_options": {"tags": list(range(1, 9))}},
        {"router": "soft_moe", "router_options": {"slots": 3}},
        {"router": "stable", "top_k": 1, "losses": {"balance": 0.3, "distillation": 0.3}},
        {"router": "top_k", "router_options": {"round_to": 2}},
        {"router": "top_k", "router_options": {"priority": "random", "token_drop": 0.1}},
        {"router": "moe_pp", "top_k": 4},
        {"router": "smear", "top_k": 1, "biases": True},
        {"router": "lory", "top_k": 1, "router_options": {"segment": 4}},
        {"router": "meo"},
        {"dispatcher": "einsum", "shared_hidden": 8, "shared": "residual"},
        {"group_size": 8, "every": 1, "biases": True, "losses": {"balance": 0.01, "z": 0.001, "batch": 0.01}},
        {"capacity_factor": None, "dispatcher": "ragged"},
    ],
    ids=str,
)
def test_every_router_and_dispatcher_keeps_to_it(options, step):
    assert breaches(step, model(**options), MeshConfig(data=2, expert=4)) == []


@pytest.mark.sweep
def test_what_a_router_sums_in_its_state_counts():
    """DynMoE adds up tokens, which are wider than the slack of narrow models."""
    wide = dataclasses.replace(model(router="dynmoe", top_k=4), width=1024)
    assert breaches("train", wide, MeshConfig(data=2, expert=4)) == []


MERGED = {"router": "lory", "top_k": 1, "router_options": {"segment": 4}}


@pytest.mark.sweep
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_experts_that_are_merged_are_gathered_once_in_each_pass(remat):
    """With evaluation's own all-gather over the same axis, and none of a layer's tokens."""
    config = dataclasses.replace(model(**MERGED), remat=remat)
    program, budget = compiled("train", config, MeshConfig(expert=8))
    assert budget.breaches(program.collectives) == []
    layers, matrices, of_one = 2, 3, 16 * 8 * 4
    assert sent(program, "all-gather") == (2 * layers * matrices, 2 * layers * matrices * of_one)
    assert sent(program, "reduce-scatter") == (layers * matrices, layers * matrices * 8 * of_one)
    if remat == "none":
        assert breaches("forward", config, MeshConfig(expert=8)) == []


@pytest.mark.sweep
@pytest.mark.parametrize(
    "options", [{"dispatcher": "ragged"}, {"shared_hidden": 8}, {"group_size": 8}, MERGED], ids=str
)
def test_so_does_a_mesh_with_tensor_and_fsdp(options):
    assert breaches("train", model(**options), MeshConfig(fsdp=2, expert=2, tensor=2)) == []


@pytest.mark.sweep
@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(expert=4, tensor=2)], ids=str
)
@pytest.mark.parametrize("options", [{"dispatcher": "ragged"}, MERGED], ids=str)
def test_so_do_biases_of_wide_experts_there(options, mesh_config):
    wide = dataclasses.replace(model(**options, biases=True), width=512)
    assert breaches("train", wide, mesh_config) == []


@pytest.mark.sweep
@pytest.mark.parametrize("mesh_config", [MeshConfig(fsdp=2, expert=4), MeshConfig(fsdp=4, tensor=2)], ids=str)
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_so_does_every_zero_stage(zero_stage, mesh_config):
    assert breaches("train", model(), mesh_config, zero_stage=zero_stage) == []


@pytest.mark.sweep
@pytest.mark.parametrize("dispatcher", ["gather", "einsum", "ragged"])
def test_bfloat16_on_the_wire_halves_the_bytes_both_ways(dispatcher):
    found = {}
    for wire in ("same", "bfloat16"):
        program, budget = compiled("train", model(wire=wire, dispatcher=dispatcher), MeshConfig(expert=8))
        assert budget.breaches(program.collectives) == []
        found[wire] = sent(program, "all-to-all")
    counts = 2 * 8 * 4 if dispatcher == "ragged" else 0  # of rows, as integers: they do not shrink
    assert found["same"][0] == found["bfloat16"][0] > 0
    assert found["same"][1] - counts == 2 * (found["bfloat16"][1] - counts)


@pytest.mark.sweep
@pytest.mark.parametrize(("dispatcher", "without", "repeated"), [("gather", 4, 6), ("ragged", 5, 8)])
def test_rematerialisation_repeats_no_all_to_all_if_it_keeps_what_arrived(dispatcher, without, repeated):
    found = {}
    for remat in ("dots", "keep_all_to_all", "offload", "full"):
        config = dataclasses.replace(model(dispatcher=dispatcher), remat=remat)
        program, budget = compiled("train", config, MeshConfig(data=2, expert=4))
        assert budget.breaches(program.collectives) == []
        assert "rematted_computation" in program.hlo
        found[remat] = sent(program, "all-to-all")[0] // 2  # a layer
    kept = dict.fromkeys(("dots", "keep_all_to_all", "offload"), without)
    assert found == kept | {"full": repeated}, "the names must be what makes the difference"


@pytest.mark.sweep
def test_so_does_a_model_that_computes_in_bfloat16():
    config = dataclasses.replace(model(), dtype="bfloat16")
    assert breaches("train", config, MeshConfig(data=2, expert=4)) == []


@pytest.mark.sweep
@pytest.mark.parametrize("remat", ["dots", "keep_all_to_all", "offload", "full"])
def test_rematerialisation_gathers_no_parameter_a_third_time(remat):
    config = dataclasses.replace(model(), remat=remat)
    assert breaches("train", config, MeshConfig(fsdp=2, expert=2, tensor=2)) == []


def attending(remat="none", **options):
    return dataclasses.replace(model(), attention=options, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "passes"), [("forward", 1), ("decode", 1), ("train", 2)])
def test_norms_over_all_heads_send_two_means_a_token_and_layer(step, passes):
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    found = {}
    for norm in ("none", "whole"):
        program, budget = compiled(step, attending(qk_norm=norm), mesh)
        assert budget.breaches(program.collectives) == []
        allowed = sum(one.bytes_per_device for one in budget.allowances if (one.op, one.axes) == REDUCED_OVER_TENSOR)
        found[norm] = sent(program, "all-reduce", "tensor")[1], allowed
    rows, tokens = ROWS // 4, 1 if step == "decode" else LENGTH
    means = passes * 2 * 4 * rows * tokens * 4
    added = [whole - none for none, whole in zip(found["none"], found["whole"], strict=True)]
    scalars = 2 * 4 * 4 if step == "train" else 0  # of the gradient's norm: two for each of four scales
    assert added == [means + scalars] * 2


@pytest.mark.sweep
@pytest.mark.parametrize(
    "config",
    [
        attending(biases="qkvo", qk_norm="head"),
        attending("full", qk_norm="whole"),
        dataclasses.replace(attending(biases="qkv"), layers=5, moe=MoEConfig(num_experts=8, hidden=8, dense_first=1)),
    ],
    ids=["head", "repeated", "dense first"],
)
def test_so_does_attention_with_biases_and_norms_behind_dense_layers(config):
    assert breaches("train", config, MeshConfig(fsdp=2, expert=2, tensor=2)) == []


@pytest.mark.sweep
@pytest.mark.parametrize("step", ["train", "decode"])
def test_so_do_layer_norms_a_bias_of_the_logits_and_a_router_that_draws_each_choice(step):
    config = dataclasses.replace(model(router="sparse_mixer"), options={"norm": "layer", "logits_bias": True})
    assert breaches(step, config, MeshConfig(fsdp=2, expert=2, tensor=2)) == []


# Planted mistakes. Each is one that was made, here or elsewhere, and that no test of numbers notices.


@pytest.mark.parametrize(
    ("step", "side"), [("forward", "from_"), ("forward", "to"), pytest.param("train", "to", marks=pytest.mark.slow)]
)
def test_a_dropped_constraint_is_caught(monkeypatch, step, side):
    """A boundary with one side: the partitioner moves more, or other things than the slots."""

    def one_sided(x, from_, to):
        return shard(x, {"from_": from_, "to": to}[side])

    monkeypatch.setattr("gshardx.layers.dispatch.slots.reshard", one_sided)
    lines = breaches(step, model(), MeshConfig(expert=8))
    assert any("all-to-all over expert" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "axes"), [("group", ("data", "fsdp")), ("expert", ()), ("expert_group", ("data",))], ids=str
)
def test_an_edited_rule_is_caught(monkeypatch, name, axes):
    monkeypatch.setitem(RULES, name, axes)
    lines = breaches("forward", model(), MeshConfig(data=2, fsdp=2, expert=2))
    assert any("all-gather over" in line and "allows none" in line for line in lines)
    assert any("all-to-all over expert" in line and "expects 4 or more" in line for line in lines)


def test_top_k_across_a_sharded_axis_is_caught(monkeypatch):
    """``jax.lax.top_k`` is a custom call on CPUs, which the partitioner does not split: every gate goes everywhere."""
    monkeypatch.setattr("gshardx.layers.routing.gshard.top_k", lambda scores, k: jax.lax.top_k(scores, k)[1])
    lines = breaches("forward", model(), MeshConfig(expert=8))
    assert any("all-gather over expert" in line and "/gate/" in line for line in lines)


@pytest.mark.parametrize(
    "again", [pytest.param("expert", marks=pytest.mark.slow), pytest.param("data", marks=pytest.mark.sweep)]
)
def test_gradients_reduced_twice_are_caught(monkeypatch, again):
    """A ``pmean`` over gradients that the partitioner has reduced. It goes over one axis and the first reduction over
    both, so that no kind of reduction alone is more than all gradients come to."""

    def build(config, steps, axes):
        def averaged(gradients, _=None):
            mean = manual(lambda x: jax.lax.pmean(x, again), [""], "", check_vma=False)
            return jax.tree.map(lambda names, x: x if "expert" in names else mean(x), axes, gradients, is_leaf=is_names)

        return optax.chain(optax.stateless(averaged), build_optimizer(config, steps, axes))

    monkeypatch.setattr("gshardx.train.job.build_optimizer", build)
    (line,) = breaches("train", model(), MeshConfig(data=2, expert=4))
    assert f"of all that is reduced across {again}" in line
    assert line.count("all-reduce over") > 1


def is_names(leaf):
    return isinstance(leaf, tuple)


def test_a_router_kernel_left_to_the_partitioner_is_caught(monkeypatch):
    """It splits the kernel over tensor, and moves it to get there."""
    monkeypatch.setattr("gshardx.layers.routing.linear.shard", lambda x, axes: x)
    lines = breaches("forward", model(), MeshConfig(fsdp=2, expert=2, tensor=2))
    assert any("collective-permute over" in line and "allows none" in line for line in lines)


def test_a_cache_written_by_rows_and_places_at_once_is_caught(monkeypatch):
    """The partitioner then sends all rows' keys and values everywhere; gshardx did so until the budget saw it."""

    def attend(self, layer, q, k, v, **unused):
        place = (layer, jnp.arange(k.shape[0])[:, None], self.positions)
        k, v = (shard(old.at[place].set(new, mode="drop"), self.AXES) for old, new in ((self.k, k), (self.v, v)))
        seen = jnp.arange(k.shape[2])[None, None, :] <= self.positions[:, :, None]
        heads = jax.nn.dot_product_attention(q, k[layer], v[layer], mask=seen[:, None])
        return heads, dataclasses.replace(self, k=k, v=v)

    monkeypatch.setattr(KVCache, "attend", attend)
    for step in ("prefill", "decode"):
        lines = breaches(step, model(), MeshConfig(expert=8))
        assert any("all-gather over expert" in line and "attention" in line for line in lines)
