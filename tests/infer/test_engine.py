"""The engine against the full forward pass, and against itself under every circumstance that must not matter."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.infer.depth import EXPLORE, Costs
from gshardx.infer.request import Output, Request, SamplingParams
from gshardx.infer.sampling import TOP
from gshardx.layers.routing import ROUTERS
from gshardx.models.decode import abstract_state
from gshardx.sharding import MeshConfig
from gshardx.sharding.guard import count_compiles
from tests.infer.answers import answered, assert_everything_is_back, check_against_full_pass, collected
from tests.infer.conftest import MODEL, SMALL, Model, texts


def mixed(seed, count):
    """Requests that use everything, some sharing the beginning of their prompts."""
    draw, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    prompts = texts(seed, count)
    common = draw.integers(0, 256, 21).astype(np.int32)
    requests = []
    for number, prompt in enumerate(prompts):
        if draw.random() < 0.4:
            prompt = np.concatenate([common[: draw.integers(1, 22)], prompt[:12]])
        elif draw.random() < 0.4:
            prompt = np.resize(prompt[:3], 12)  # it repeats itself, and the answer need not
        params = SamplingParams(
            max_new_tokens=int(draw.integers(1, 24)),
            temperature=float(draw.choice([0.0, 0.7, 1.0, 1.5])),
            top_k=int(draw.choice([0, 0, 3, 40])),
            top_p=float(draw.choice([1.0, 1.0, 0.8])),
            min_p=float(draw.choice([0.0, 0.0, 0.1])),
            repetition_penalty=float(draw.choice([1.0, 1.0, 1.3])),
            presence_penalty=float(draw.choice([0.0, 0.0, 0.5])),
            frequency_penalty=float(draw.choice([0.0, 0.0, 0.4])),
            logit_bias={} if draw.random() < 0.7 else {int(draw.integers(0, 256)): 4.0, 65: -100.0},
            seed=int(draw.integers(0, 1000)),
            n=int(draw.choice([1, 1, 1, 3])),
            logprobs=int(draw.choice([0, 5])),
            stop=() if draw.random() < 0.7 else ("e", "\x10\x11"),
            stop_tokens=() if draw.random() < 0.7 else (10, 117),
            prompt_logprobs=None if other.random() < 0.8 else 3,
            json_schema=None if number % 40 != 39 else '{"type": "array", "items": {"type": "integer"}}',
            experts=other.random() < 0.3,
        )
        requests.append(Request(str(number), prompt, params, priority=int(draw.integers(0, 3))))
    return requests


def plain(seed, count):
    return [
        Request(str(i), p, SamplingParams(max_new_tokens=9, temperature=float(i % 2), logprobs=0, ignore_end=True,
                                          prompt_logprobs=0, experts=True))
        for i, p in enumerate(texts(seed, count))
    ]  # fmt: skip


def test_paged_decoding_equals_the_training_forward(model, engine):
    requests = plain(1, 6)
    check_against_full_pass(model.plan, model.variables, requests, answered(engine, requests))


@pytest.fixture(scope="module")
def requests():
    return mixed(2, 24)


@pytest.fixture(scope="module")
def usual(model, engine, requests):
    return answered(engine, requests)


def test_alone_as_in_company(engine, requests, usual):
    for request in requests:
        assert answered(engine, [request])[request.id, 0] == usual[request.id, 0]


@pytest.mark.slow
def test_in_any_order_and_one_after_the_other(engine, requests, usual):
    assert answered(engine, requests[::-1]) == usual
    outputs, waiting = [], list(requests)
    while waiting or not engine.idle:
        if waiting:
            engine.submit(waiting.pop())
        outputs += engine.step()
    assert collected(outputs) == usual


OTHER = {
    "smaller chunks": {"budget": 8},
    "one token a call": {"steps": 1},
    "fewer slots": {"slots": 2},
    "larger tiles": {"slots": 16, "tile": 16},  # in which experts take fewer rows than there are
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=getattr(pytest.mark, "slow" if name == "smaller chunks" else "sweep")) for name in OTHER],
)
def test_engines_of_other_sizes_answer_alike(model, requests, usual, name):
    assert answered(model.engine(dataclasses.replace(SMALL, **OTHER[name])), requests) == usual


def test_little_ahead_answers_alike_in_shorter_calls(model, engine, requests, usual):
    short, before = model.engine(dataclasses.replace(SMALL, ahead_ms=1e-3)), engine.stats.calls
    assert answered(short, plain(5, 2)) == answered(engine, plain(5, 2))
    assert engine.stats.calls - before < 9 <= short.stats.calls  # nine tokens each
    assert answered(short, requests) == usual


@pytest.mark.slow
def test_prefixes_are_found_and_change_nothing(model, engine, requests, usual):
    fresh = model.engine()
    assert answered(fresh, requests) == usual
    cached = fresh.stats.cached_tokens
    assert answered(fresh, requests) == usual
    assert fresh.stats.cached_tokens > cached + 50


@pytest.mark.slow
def test_those_that_gave_up_their_pages_say_the_same(model, requests, usual):
    scarce = model.engine(dataclasses.replace(SMALL, pages=16))
    assert answered(scarce, requests) == usual
    assert scarce.stats.retractions > 0


FREE = Costs(plain=lambda rows: 1.0, check=lambda tokens: 1.0, draft=lambda rows: 0.0)
"""What makes guessing always worth it."""


@pytest.mark.parametrize(
    "drafts",
    [pytest.param("prompt_lookup", marks=pytest.mark.slow), pytest.param("fewer_experts", marks=pytest.mark.sweep)],
)
def test_guesses_change_nothing(model, engine, requests, usual, monkeypatch, drafts):
    coin = SamplingParams(max_new_tokens=30, logit_bias={97: 50.0, 98: 50.0})  # of which half of the guesses are wrong
    coins = [Request("coin", np.asarray([97, 98], np.int32), coin)]
    requests, usual = [*coins, *requests], {**answered(engine, coins), **usual}
    monkeypatch.setattr("gshardx.infer.engine.measured_costs", lambda *_: FREE)
    engine = model.engine(dataclasses.replace(SMALL, drafts=drafts, draft_depth=3))
    assert answered(engine, requests) == usual
    assert 0 < engine.stats.accepted_tokens < engine.stats.guessed_tokens
    again = model.engine(dataclasses.replace(SMALL, drafts=drafts, draft_depth=3, pages=16))
    assert answered(again, requests[::-1]) == usual
    assert again.stats.retractions > 0


@pytest.mark.slow
def test_guesses_are_off_where_they_lose(model, requests, usual, monkeypatch):
    """The same engine with what calls cost: nothing is gained by checks that cost as much as their tokens."""
    dear = Costs(plain=lambda rows: 1.0, check=lambda tokens: 2.0 * tokens, draft=lambda rows: 1.0)
    monkeypatch.setattr("gshardx.infer.engine.measured_costs", lambda *_: dear)
    engine = model.engine(dataclasses.replace(SMALL, drafts="prompt_lookup"))
    assert answered(engine, requests) == usual
    assert engine.stats.guessed_tokens <= engine.stats.calls // EXPLORE * SMALL.slots


@pytest.mark.slow
def test_eight_bit_keys_and_values_stay_near(model, engine):
    """Nearer than chance would have it: KL of the first drawn token, over its 20 best, and agreement of the best."""
    requests = [
        Request(str(i), p, SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=TOP, ignore_end=True))
        for i, p in enumerate(texts(11, 40))
    ]
    full, small = (answered(e, requests) for e in (engine, model.engine(dataclasses.replace(SMALL, kv_dtype="int8"))))
    distances = []
    for key, answer in full.items():
        p, q = (dict(one.logprobs[0].best) for one in (answer, small[key]))
        distances.append(sum(np.exp(p[token]) * (p[token] - q[token]) for token in p if token in q))
    assert 0 < np.abs(distances).mean() < 1e-3
    assert np.mean([full[key].tokens == small[key].tokens for key in full]) > 0.9


TAGS = [146, 65, 7, 110, 252, 1, 2, 3]  # the first four stand inside the prompts, alone or with others
ROUTER_CONFIGS = {
    "gshard": {"router": "gshard"},
    "switch": {"router": "switch", "top_k": 1},
    "top_k": {"router": "top_k"},
    "top_k in groups": {"router": "top_k", "router_options": {"groups": 4, "groups_kept": 2}},
    "sigmoid_bias": {"router": "sigmoid_bias"},
    "noisy_top_k": {"router": "noisy_top_k"},
    "dynmoe": {"router": "dynmoe", "top_k": 4, "router_options": {"initial": 6}},
    "adamoe": {"router": "adamoe"},
    "cosine": {"router": "cosine"},
    "skywork": {"router": "skywork"},
    "hash": {"router": "hash"},
    "base": {"router": "base", "top_k": 1},
    "sinkhorn": {"router": "sinkhorn"},
    "quantile": {"router": "quantile"},
    "smoe_dropout": {"router": "smoe_dropout", "top_k": 4, "router_options": {"serve": 3}},
    "ds_moe": {"router": "ds_moe"},
    "dselect_k": {"router": "dselect_k"},
    "relu": {"router": "relu", "losses": {"sparsity": 1.0}},
    "lory": {"router": "lory", "top_k": 1, "router_options": {"segment": 8}},
    "sentence": {"router": "sentence"},
    "task": {"router": "task", "router_options": {"tags": TAGS[:5]}},
    "demix": {"router": "demix", "top_k": 1, "router_options": {"tags": TAGS}},
    "sparse_mixer": {"router": "sparse_mixer", "router_options": {"jitter": 0.3}},
    "stable": {"router": "stable", "top_k": 1, "losses": {"distillation": 0.3}},
    "moe_pp": {"router": "moe_pp", "router_options": {"copy": 2}},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=getattr(pytest.mark, "slow" if name == "sigmoid_bias" else "sweep"))
        for name in ROUTER_CONFIGS
    ],
)
def test_every_router_decodes_as_it_is_trained(name):
    """Training's forward pass and paged decoding, within 1e-5."""
    moe = dataclasses.replace(MODEL.moe, **ROUTER_CONFIGS[name])
    own = Model(config=dataclasses.replace(MODEL, moe=moe))
    requests = plain(8, 3)
    small = dataclasses.replace(SMALL, slots=2, budget=8)
    check_against_full_pass(own.plan, own.variables, requests, answered(own.engine(small), requests))


NOT_CAUSAL = {
    "expert_choice": ({}, "later ones too"),
    "soft_moe": ({}, "later ones too"),
    "smear": ({"top_k": 1}, "later ones too"),
    "meo": ({}, "later ones too"),
}
"""Their settings, and why."""


def test_stretches_that_begin_inside_a_row_are_not_served():
    moe = dataclasses.replace(MODEL.moe, router="lory", top_k=1, group_size=8)
    own = Model(config=dataclasses.replace(MODEL, moe=moe))
    with pytest.raises(BadInput, match=r"model\.moe\.group_size = 8: stretches of lory begin anew in each group"):
        abstract_state(own.plan, 8, 16, own.mesh)


def test_every_router_is_in_that_test():
    assert {options["router"] for options in ROUTER_CONFIGS.values()} == set(ROUTERS) - set(NOT_CAUSAL)


@pytest.mark.parametrize("router", NOT_CAUSAL)
def test_routers_that_see_later_tokens_are_not_served(router):
    options, why = NOT_CAUSAL[router]
    own = Model(config=dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, router=router, **options)))
    message = f"model.moe.router = {router} can't decode: .* {why}; train with gshard or top_k"
    with pytest.raises(BadInput, match=message):
        own.engine(SMALL)
    with pytest.raises(BadInput, match=message):
        abstract_state(own.plan, 8, 16, own.mesh)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start(model, requests):
    engine = model.engine()
    with count_compiles() as count:
        answered(engine, requests)
    assert count.compiled == []
    assert engine.stats.compilations == 0


@pytest.mark.slow
def test_choices_share_the_pages_of_their_prompt(engine, model):
    engine = model.engine()
    prompt = texts(9, 1, 60)[0]
    prompt = np.resize(prompt, 33)
    answers = answered(engine, [Request("a", prompt, SamplingParams(max_new_tokens=5, n=4))])
    assert len({tuple(answer.tokens) for answer in answers.values()}) > 1
    assert engine.stats.cached_tokens == 3 * 32, "three found all whole pages but what the last token needs"


@pytest.mark.slow
def test_families_share_nothing(model):
    engine, prompt = model.engine(), np.arange(40, dtype=np.int32)
    for family in ("a", "b"):
        answered(engine, [Request(family, prompt, SamplingParams(max_new_tokens=1), family=family)])
    assert engine.stats.cached_tokens == 0


def test_a_cancelled_request_is_gone_at_once(engine):
    for number, prompt in enumerate(texts(3, 8)):
        engine.submit(Request(str(number), prompt, SamplingParams(max_new_tokens=30, ignore_end=True)))
    outputs = engine.step() + engine.step()
    for number in (0, 7):  # one that runs, one that waits
        engine.cancel(str(number))
    assert len(engine.scheduler.running) <= 3
    answers = collected([*outputs, *engine.run()])
    assert [answers[str(number), 0].reason for number in range(8)] == ["cancelled", *["length"] * 6, "cancelled"]
    assert_everything_is_back(engine)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", np.zeros(0, np.int32), SamplingParams()), "prompt is empty"),
        (Request("r", np.zeros(60, np.int32), SamplingParams(max_new_tokens=5)), "over the length of 64"),
        (Request("r", np.asarray([3, 999], np.int32), SamplingParams(max_new_tokens=5)), "no token 999"),
        (Request("r", np.zeros(1, np.int32), SamplingParams(max_new_tokens=5, logit_bias={-2: 1.0})), "no token -2"),
    ],
)
def test_what_cant_be_served_is_refused(engine, request_, message):
    with pytest.raises(BadInput, match=message):
        engine.submit(request_)
    assert engine.idle


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=2, expert=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(expert=8), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_eight_devices_answer_as_one(model, mesh):
    check_many_devices(model, Model(mesh), dataclasses.replace(SMALL, slots=2, pages=40))


@pytest.mark.parametrize(
    "exchange", [pytest.param("sliced", marks=pytest.mark.slow), pytest.param("all_to_all", marks=pytest.mark.sweep)]
)
def test_every_way_to_the_experts_answers_alike(model, exchange, monkeypatch):
    monkeypatch.setattr("gshardx.infer.exchange.NARROWEST", 4)
    config = dataclasses.replace(SMALL, slots=2, budget=8, pages=40, exchange=exchange)
    check_many_devices(model, Model(MeshConfig(expert=2)), config)


@pytest.mark.slow
def test_programs_of_another_way_are_kept_apart(tmp_path):
    many, before = Model(MeshConfig(expert=2)), jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        for exchange in ("replicate", "all_to_all", "replicate"):
            many.engine(dataclasses.replace(SMALL, slots=2, budget=8, exchange=exchange))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(list((tmp_path / "steps").glob("decode_2-*"))) == 2


def check_many_devices(model, many, config):
    requests = plain(4, 12)
    answers = answered(many.engine(config), requests)
    check_against_full_pass(many.plan, many.variables, requests, answers)
    one = answered(model.engine(), requests)
    for key, answer in answers.items():
        assert answer.tokens == one[key].tokens
        np.testing.assert_allclose(*([x.logprob for x in a.logprobs] for a in (answer, one[key])), atol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(), marks=pytest.mark.sweep),
        pytest.param(MeshConfig(expert=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_experts_may_move_while_it_serves(model, mesh):
    """Other places in every layer, twice; nothing of the engine's own is compiled again."""
    own, requests = Model(mesh), plain(6, 4)
    engine = own.engine(dataclasses.replace(SMALL, slots=2, budget=8))
    first = answered(engine, requests)
    draw = np.random.default_rng(0)
    for _ in range(2):
        engine.move_experts(np.stack([draw.permutation(8)]))
        again = answered(engine, requests)
        for key, answer in again.items():
            assert answer.tokens == first[key].tokens
            np.testing.assert_allclose(*([x.logprob for x in a.logprobs] for a in (answer, first[key])), atol=1e-5)


def test_places_are_permutations(engine):
    with pytest.raises(BadInput, match="permutation of the experts"):
        engine.move_experts(np.zeros((1, 8), int))


def faulty(engine, monkeypatch, victim, kind):
    """Plant a fault that hits one request alone."""
    emit, admit = engine._emit, engine._admit

    def broken(*_):
        raise RuntimeError("planted")

    def emit_of_all(live, segment, found, steps):
        if live.request.id == victim and len(live.text._tokens) >= 2:
            if kind == "text":
                monkeypatch.setattr(live.text, "add", broken)
            elif kind == "result":
                found = {name: values for name, values in found.items() if name != "token"}
            elif kind == "caller":
                engine.cancel(victim)
                return Output(victim, live.choice, (), "", (), None)
        return emit(live, segment, found, steps)

    def admit_with_nan(sequence, params):
        admit(sequence, params)
        if engine._live[sequence].request.id == victim:
            bias = np.array(engine._state.bias)
            bias[sequence.shard, sequence.slot] = np.nan
            place = engine._state.bias.sharding
            engine._state = dataclasses.replace(engine._state, bias=jax.device_put(bias, place))

    monkeypatch.setattr(engine, "_emit", emit_of_all)
    if kind == "nan":
        monkeypatch.setattr(engine, "_admit", admit_with_nan)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "result", "caller", "nan"])
def test_a_fault_of_one_request_ends_it_alone(engine, requests, usual, kind):
    long = [r for r in requests if r.params.max_new_tokens >= 6 and len(usual[r.id, 0].tokens) >= 5]
    biased = [r for r in long if r.params.logit_bias]
    for victim in (biased if kind == "nan" else long)[:5]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            faulty(engine, monkeypatch, victim.id, kind)
            answers = answered(engine, requests)
        for key, answer in answers.items():
            if key[0] != victim.id:
                assert answer == usual[key]
        ended = {answers[victim.id, choice].reason for choice in range(victim.params.n)}
        assert ended == {"cancelled" if kind == "caller" else "error"}
        errors = [answers[victim.id, 0].error]
        told = {"text": "planted", "result": "token", "caller": "", "nan": "scores are not finite"}
        assert told[kind] in errors[0]


@pytest.mark.sweep
def test_a_thousand_requests_in_every_way(model, monkeypatch):
    """In another order, with too few pages for all, and with guesses; :func:`answered` forbids compilations."""
    monkeypatch.setattr("gshardx.infer.engine.measured_costs", lambda *_: FREE)
    config, requests = dataclasses.replace(SMALL, slots=16, tile=16, pages=60), mixed(7, 1000)
    engine = model.engine(config)
    first = answered(engine, requests)
    assert answered(engine, [requests[i] for i in np.random.default_rng(0).permutation(1000)]) == first
    assert engine.stats.retractions > 0
    assert engine.stats.cached_tokens > 1000
    guessing = model.engine(dataclasses.replace(config, drafts="prompt_lookup", draft_depth=3))
    assert answered(guessing, requests) == first
    assert guessing.stats.accepted_tokens > 100


def test_a_schema_is_obeyed_and_neighbours_do_not_notice(engine, requests, usual):
    schema = (
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}'
    )
    params = SamplingParams(max_new_tokens=30, json_schema=schema, n=2, seed=4)
    answers = answered(engine, [Request("json", np.frombuffer(b"To be", np.uint8), params), *requests])
    for choice in range(2):
        text = answers.pop(("json", choice)).text
        assert list(json.loads(text)) == ["a"]
    assert answers == usual


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}'])
def test_a_schema_that_is_none_is_refused(engine, schema):
    with pytest.raises(BadInput, match="json_schema"):
        engine.submit(Request("x", np.asarray([1]), SamplingParams(max_new_tokens=9, json_schema=schema)))
    assert engine.idle


def test_the_load_of_experts_is_counted(model):
    engine, one = model.engine(), plain(3, 1)[0]
    answered(engine, [one])
    computed = len(one.prompt) + one.params.max_new_tokens - 1  # the last token goes nowhere
    assert engine.stats.expert_load.sum() == computed * engine.choices
    assert engine.stats.dropped_choices == 0
