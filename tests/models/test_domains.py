"""Texts read by all domains at once, against Bayes' rule in plain numbers."""

import dataclasses
import functools
import math
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import Packed
from gshardx.models.build import Variables, blueprint
from gshardx.models.domains import DomainMixture, mixed
from gshardx.models.generator import SamplingOptions
from gshardx.sharding import MeshConfig, build_mesh

VOCAB, TAGS = 20, [17, 18, 19]
MOE = MoEConfig(num_experts=3, top_k=1, hidden=16, router="demix", router_options={"tags": TAGS})
MODEL = ModelConfig(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, hidden=16, moe=MOE)
MESH = build_mesh(MeshConfig())
GREEDY = SamplingOptions(temperature=0.0)


Made = namedtuple("Made", "plan variables probabilities")


@pytest.fixture(scope="module")
def made():
    """Larger weights than drawn ones, so that domains differ."""
    plan = blueprint(MODEL, VOCAB, MESH)
    variables = Variables(jax.tree.map(lambda p: 2 * p, plan.init(jax.random.key(0))), plan.init_router())
    return Made(plan, variables, jax.jit(functools.partial(full_pass, plan)))


def full_pass(plan, variables, row, real):
    model = plan.bind(variables.params)
    places = jnp.arange(row.shape[1])[None]
    hidden, _, _ = model.hidden(row, places, real > 0, Packed.of(real), None, variables.router)
    return jax.nn.softmax(model.logits(hidden)[0])


def chance_of(made, tokens):
    """The model's probabilities of what follows each token of one row."""
    row, real = np.zeros((2, 1, 16), np.int32)
    row[0, : len(tokens)], real[0, : len(tokens)] = tokens, 1
    return np.asarray(made.probabilities(made.variables, row, real)).astype(float)


def by_bayes(made, text, prior):
    """log p of each token and p(d) before each and at the end; loops."""
    weights, log_p, chances = list(prior), [], [list(prior)]
    each = [chance_of(made, [tag, *text]) for tag in TAGS]
    for place, token in enumerate(text):
        told = [each[d][place, token] for d in range(len(TAGS))]
        log_p.append(math.log(sum(w * p for w, p in zip(weights, told, strict=True))))
        weights = [w * p for w, p in zip(weights, told, strict=True)]
        weights = [w / sum(weights) for w in weights]
        chances.append(weights)
    following = sum(w * each[d][len(text)] for d, w in enumerate(weights))
    return log_p, chances, following


@pytest.mark.parametrize("prior", [None, [0.7, 0.2, 0.1]])
def test_scores_are_those_of_bayes_rule(made, prior):
    texts = np.random.default_rng(0).integers(0, 17, (2, 9)).astype(np.int32)
    valid = np.arange(9) < np.asarray([[9], [5]])
    log_p, chances = DomainMixture(*made[:2], MESH, length=10, prior=prior).score(texts, valid)
    for row, length in enumerate((9, 5)):
        expected, weights, _ = by_bayes(made, texts[row, :length], prior or [1 / 3] * 3)
        np.testing.assert_allclose(log_p[row, :length], expected, rtol=1e-4)
        np.testing.assert_allclose(chances[row, : length + 1], weights, rtol=1e-4)
        np.testing.assert_array_equal(log_p[row, length:], 0.0)
    assert np.ptp(chances[0], axis=0).max() > 0.2, "the text speaks for some domains and against others"


def test_greedy_text_is_the_mixtures_best_token_each_time(made):
    prompts = np.random.default_rng(1).integers(0, 17, (2, 4)).astype(np.int32)
    drawn = DomainMixture(*made[:2], MESH, length=12).generate(prompts, 6, GREEDY)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for token in drawn[row]:
            following = by_bayes(made, text, [1 / 3] * 3)[2]
            assert following[token] > following.max() - 1e-6
            text.append(token)


def test_one_certain_domain_is_that_domain(made):
    log_p, chances = mixed(np.log(np.full((1, 2, 3), [[0.5], [0.25]])), np.asarray([0.0, -np.inf]))
    np.testing.assert_allclose(log_p, np.full((1, 3), math.log(0.5)), rtol=1e-6)
    np.testing.assert_allclose(np.exp(chances), np.tile([1.0, 0.0], (1, 4, 1)))


def test_what_does_not_fit_is_refused(made):
    plan, variables, _ = made
    mixture = DomainMixture(plan, variables, MESH, length=10)
    text = np.zeros((1, 10), np.int32)
    with pytest.raises(BadInput, match="over the length of 10"):
        mixture.score(text)
    with pytest.raises(BadInput, match="6 new ones: over 10"):
        mixture.generate(text[:, :4], 6)
    with pytest.raises(BadInput, match="prior has 2 domains, but the model has 3"):
        DomainMixture(plan, variables, MESH, length=10, prior=[0.5, 0.5])
    other = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=3, hidden=16, router="top_k"))
    with pytest.raises(BadInput, match=r"model\.moe\.router = top_k: domains are mixed where it is demix"):
        DomainMixture(blueprint(other, VOCAB, MESH), variables, MESH, length=10)
