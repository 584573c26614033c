"""SMoE-Dropout against loops: its schedule step by step, and a router that stays as it was drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.checkpoint.store import CheckpointStore, load
from gshardx.config import OptimizerConfig
from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, SmoeDropoutRouter
from gshardx.layers.routing.smoe_dropout import ScheduleState, grows_at
from gshardx.models.build import Variables
from gshardx.models.items import items_of, variables_of
from gshardx.train.optimizer import build_optimizer
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import smoe_dropout as oracle

SETTINGS = {
    "to all": ((12, 4, 4), Capacity(None), {"steps": 30}),
    "tight": ((13, 8, 3), Capacity(0.6), {"steps": 10, "fewest": 2, "serve": 2}),
    "by gate": ((12, 5, 3), Capacity(0.5), {"steps": 3, "priority": "gate"}),
}


def at(step):
    return ScheduleState(jnp.int32(step))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    step = seed % 40
    call = compiled(SmoeDropoutRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0) if training else None, at(step))
    width = k if training else options.get("serve", k)
    now = oracle.number_of_experts(step, options.get("fewest", 1), k, options["steps"]) if training else width
    slots, priority = capacity_of(capacity, s, e, width, training), options.get("priority", "position")
    groups = [
        oracle.route(np.asarray(logits[g], np.float64), now, width, slots, valid[g], priority=priority)
        for g in range(G)
    ]
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    check(routing, groups)


@pytest.mark.parametrize(("fewest", "most", "steps"), [(1, 4, 7), (2, 8, 100), (1, 2, 1), (3, 3, 5), (1, 16, 3)])
def test_every_step_has_the_number_of_experts_that_the_formula_gives(fewest, most, steps):
    found = [fewest + sum(step >= first for first in grows_at(fewest, most, steps)) for step in range(steps + 3)]
    assert found == [oracle.number_of_experts(step, fewest, most, steps) for step in range(steps + 3)]


def test_a_restored_state_goes_on_where_the_number_of_experts_was(tmp_path):
    tokens, kernel, valid = data(1, "random", 12, 4)
    router = SmoeDropoutRouter(M, 4, 4, steps=9, rngs=nnx.Rngs(0))
    call = compiled(SmoeDropoutRouter, 4, 4, steps=9, capacity=Capacity(None))
    state, numbers = router.initial_state(), []
    for step in range(12):
        if step == 5:
            state = restored(tmp_path, state)
        routing, _ = call(kernel, tokens, valid, jax.random.key(0), state)
        numbers.append(int(routing.keep[0, 0].sum()))
        state = router.after_step(routing.state)
    assert numbers == [oracle.number_of_experts(step, 1, 4, 9) for step in range(12)]
    assert state.step == 9, "no more is counted than is needed"


def restored(folder, state):
    """Through a checkpoint."""
    items = items_of(Variables({"w": jnp.zeros(2)}, state))
    store = CheckpointStore(folder, every=1, keep=1)
    store.save(1, items)
    store.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    return variables_of(load(folder, 1, abstract), Variables({}, state)).router


def test_training_and_weight_decay_leave_the_kernel_as_it_was():
    router = SmoeDropoutRouter(M, 4, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(router)
    params, axes = nnx.to_pure_dict(params), {"kernel": router.kernel.get_metadata()["axes"]}
    tokens, _, valid = data(1, "random", 12, 4)

    def loss(params, tokens):
        routing = nnx.merge(graph, params)(tokens, valid, jax.random.key(0), router.initial_state())
        return jnp.sum(routing.weights[..., 0] ** 2) + routing.losses["balance"] + routing.losses["z"]

    of_kernel, of_tokens = jax.grad(loss, argnums=(0, 1))(params, tokens)
    np.testing.assert_array_equal(of_kernel["kernel"], 0.0)
    assert np.abs(of_tokens).max() > 1e-4, "gates have a gradient, as the network before them learns"
    optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.5, warmup_steps=0), 10, axes)
    updates, _ = jax.jit(optimizer.update)(of_kernel, optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], params["kernel"])


@pytest.mark.parametrize("options", [{"fewest": 0}, {"fewest": 3}, {"serve": 3}, {"steps": 0}], ids=str)
def test_options_that_cannot_be_met_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(BadInput, match=f"{name} = {value}"):
        SmoeDropoutRouter(M, 8, 2, **options, rngs=nnx.Rngs(0))
