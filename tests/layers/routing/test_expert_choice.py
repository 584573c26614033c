"""Expert choice against loops, and what it promises."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, ExpertChoiceRouter
from tests.layers.routing.cases import DRAWN, G, capacity_of, check, compiled, data
from tests.oracles import expert_choice as oracle

SETTINGS = {
    "as many as tokens choose": ((12, 8, 2), Capacity(1.0), {}),
    "wide": ((13, 3, 2), Capacity(1.4), {}),
    "one token": ((1, 3, 1), Capacity(0.01, minimum=4), {}),
    "capped": ((12, 4, 2), Capacity(1.0), {"most": 2}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    call = compiled(ExpertChoiceRouter, e, k, capacity=capacity, **options)
    routing, _ = call(kernel, tokens, valid, jax.random.key(0) if training else None)
    logits = np.einsum("gsm,me->gse", tokens.astype(np.float64), kernel)
    slots = capacity_of(capacity, s, e, k, training=True)
    groups = [oracle.route(logits[g], k, slots, valid[g], **options) for g in range(G)]
    assume(min(group.margin for group in groups) > (1e-3 if "most" in options else 1e-6))
    assert routing.capacity == slots
    check(routing, groups)


def test_every_expert_has_as_many_tokens_and_some_tokens_none():
    tokens, kernel, valid = data(0, "one expert", 32, 8, padding="some")
    routing, _ = compiled(ExpertChoiceRouter, 8, 2, capacity=Capacity(1.0))(kernel, tokens, valid, None)
    np.testing.assert_array_equal(np.asarray(routing.keep).sum(1), routing.capacity)
    by_token = np.asarray(routing.keep).sum(-1)[valid]
    assert by_token.min() == 0
    assert by_token.max() > 2
    assert float(routing.stats.load_max_over_mean) == 1.0
    assert float(routing.losses["balance"]) == pytest.approx(1.0)


def test_with_a_cap_no_token_goes_to_many_experts():
    """Half of the experts like the same tokens best. With as many places as experts take, every token has its two."""
    tokens, kernel, valid = data(0, "random", 32, 8)
    alike = np.concatenate([kernel[:, :4] * 0.1 + 2 * kernel[:, :1], kernel[:, 4:] * 0.1], axis=1)
    free, bound = (
        np.asarray(
            compiled(ExpertChoiceRouter, 8, 2, capacity=Capacity(1.0), most=most, iterations=2000)(
                alike, tokens, valid, None
            )[0].keep
        )
        for most in (None, 2)
    )
    np.testing.assert_array_equal(bound.sum(1), free.sum(1))
    assert free.sum(-1).max() >= 4
    assert bound.sum(-1).max() <= 3  # 2, and a fraction of a token that became a whole one
    assert (bound.sum(-1) == 2).mean() > 0.8 > (free.sum(-1) == 2).mean()


@pytest.mark.parametrize(
    ("options", "mend"),
    [({"capacity": Capacity(None)}, "use a factor of 1.0"), ({"most": 2, "capacity": Capacity(1.25)}, "use 3 or more")],
    ids=["dropless", "most"],
)
def test_what_can_not_be_is_refused(options, mend):
    with pytest.raises(BadInput, match=mend):
        compiled(ExpertChoiceRouter, 8, 2, **options)
