"""Sampling on the device against sorting in NumPy, and against its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.infer.sampling import TOP, Context, Draw, draw

V = 32
RULES = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0,
         "frequency": 0.0, "seed": 0, "choice": 0, "biased": 1, "constrained": 0, "alternatives": 0}  # fmt: skip
TYPES = {
    "top_k": np.int32,
    "seed": np.uint32,
    "choice": np.uint32,
    "biased": np.int32,
    "alternatives": np.int32,
    "constrained": np.int32,
}


@jax.jit
def drawing(logits, how, position, target, history, bias, allowed):
    return draw(logits, how, position, target, lambda: Context(history, bias, allowed))


def how(rows, **given):
    return Draw(**{name: np.full(rows, given.get(name, value), TYPES.get(name, np.float32))
                   if not isinstance(given.get(name), list) else np.asarray(given[name], TYPES.get(name, np.float32))
                   for name, value in RULES.items()})  # fmt: skip


def drawn(logits, position=None, history=None, bias=None, target=None, allowed=None, **settings):
    rows = len(logits)
    return drawing(
        jnp.asarray(logits),
        how(rows, **settings),
        np.zeros(rows, np.int32) if position is None else position,
        np.full(rows, -1, np.int32) if target is None else target,
        np.zeros((rows, V), np.int32) if history is None else history,
        np.zeros((rows, V), np.float32) if bias is None else bias,
        np.zeros((rows, V // 32), np.uint32) if allowed is None else allowed,
    )


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(1, V)).astype(np.float32) * 2


def allowed(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The tokens that may be drawn and their probabilities, by sorting, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    keep = order[: top_k or len(order)]
    p = np.exp(scaled[keep] - scaled.max())
    p /= p.sum()
    keep = keep[: np.searchsorted(np.cumsum(p), top_p * (1 - 1e-6)) + 1]
    p = np.exp(scaled[keep] - scaled.max())
    keep, p = keep[p >= min_p], p[p >= min_p]
    return keep, p / p.sum()


CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    {"top_p": 1e-6},
    {"top_k": 1},
    {"top_p": 0.0},
    {"top_p": 1e-39},
    {"top_k": V + 1},
    {"top_k": 2**31 - 1},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_draws_follow_the_distribution_that_the_cuts_leave(logits, settings):
    rows = 20_000
    tokens = np.asarray(drawn(np.repeat(logits, rows, 0), position=np.arange(rows, dtype=np.int32), **settings).token)
    keep, p = allowed(logits[0], **settings)
    count = np.bincount(tokens, minlength=V)
    assert count[keep].sum() == rows, "a token that was cut"
    enough = p * rows >= 5
    chi_square = ((count[keep] - p * rows) ** 2 / (p * rows))[enough].sum()
    freedom = max(enough.sum() - 1, 1)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_what_equals_the_last_of_the_k_best_stays():
    logits = np.zeros((2_000, V), np.float32)
    logits[:, :3] = 1.0
    tokens = np.asarray(drawn(logits, position=np.arange(2_000, dtype=np.int32), top_k=2).token)
    assert set(tokens) == {0, 1, 2}


def test_temperature_zero_takes_the_best_whatever_the_seed(logits):
    assert int(drawn(logits, temperature=0.0, seed=7).token[0]) == logits[0].argmax()


def test_a_row_draws_by_its_own_settings_and_the_same_beside_any_other():
    draw_ = np.random.default_rng(1)
    logits = draw_.normal(size=(6, V)).astype(np.float32) * 3
    settings = {"temperature": [0.0, 1.0, 0.7, 1.0, 1.0, 2.0], "top_k": [0, 3, 0, 0, 0, 7], "seed": [1, 2, 3, 2, 5, 6],
                "top_p": [1.0, 1.0, 0.5, 1.0, 1.0, 1.0], "presence": [0.0, 0.0, 0.0, 2.0, 0.0, 0.0],
                "choice": [0, 0, 1, 2, 0, 0], "alternatives": [0, 0, 0, 0, 4, 0]}  # fmt: skip
    history = draw_.integers(0, 3, (6, V)).astype(np.int32)
    together = drawn(logits, np.arange(6, dtype=np.int32), history, **settings)
    for row in range(6):
        own = {name: values[row] for name, values in settings.items()}
        alone = drawn(logits[row : row + 1], np.asarray([row], np.int32), history[row : row + 1], **own)
        assert int(alone.token[0]) == int(together.token[row])
        assert float(alone.logprob[0]) == float(together.logprob[row])


def test_penalties_and_bias_as_published(logits):
    history = np.zeros((1, V), np.int32)
    history[0, 3], history[0, 4], history[0, 5] = 1, 2 * 3, 2 * 1 + 1  # in the prompt; thrice in the output; both
    bias = np.zeros((1, V), np.float32)
    bias[0, 9] = -100.0

    def scores(**settings):
        """What the row would draw from, read off the draws' Gumbel-free limit: one token lifted at a time."""
        expected = logits[0].astype(np.float64).copy()
        for token in (3, 4, 5):
            r = settings.get("repetition", 1.0)
            expected[token] = expected[token] / r if expected[token] > 0 else expected[token] * r
        for token, count in ((4, 3), (5, 1)):
            expected[token] -= settings.get("presence", 0.0) + settings.get("frequency", 0.0) * count
        return expected + bias[0]

    for settings in ({"repetition": 1.5}, {"presence": 0.7}, {"frequency": 0.3}, {"repetition": 0.8, "frequency": 1.0}):
        expected = scores(**settings)
        for token in (3, 4, 5, 9):
            # Lifted by the gap to the best score less a little, a token is not drawn yet; a little more, and it is.
            gap = expected.max() - expected[token]
            for extra, wins in ((-1e-3, expected[token] == expected.max()), (1e-3, True)):
                lifted = bias.copy()
                lifted[0, token] += gap + extra
                got = int(drawn(logits, history=history, bias=lifted, temperature=0.0, **settings).token[0])
                assert (got == token) == wins


def test_logprobs_are_the_models_own(logits):
    bias = np.zeros((1, V), np.float32)
    bias[0, 7] = 50.0
    found = drawn(logits, bias=bias, temperature=0.3, alternatives=2)
    expected = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert int(found.token[0]) == 7
    np.testing.assert_allclose(float(found.logprob[0]), expected[7], atol=1e-5)
    best = np.argsort(-expected)[:TOP]
    np.testing.assert_array_equal(found.best[0], best)
    np.testing.assert_allclose(found.best_logprob[0], expected[best], atol=1e-5)


def test_a_known_token_has_its_own_logprob_and_changes_no_other_row():
    logits = np.random.default_rng(2).normal(size=(3, V)).astype(np.float32)
    free, told = drawn(logits), drawn(logits, target=np.asarray([-1, 9, -1], np.int32))
    expected = logits[1].astype(np.float64) - np.log(np.exp(logits[1].astype(np.float64)).sum())
    assert int(told.token[1]) == 9
    np.testing.assert_allclose(float(told.logprob[1]), expected[9], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(told.token)[[0, 2]], np.asarray(free.token)[[0, 2]])
    np.testing.assert_array_equal(np.asarray(told.logprob)[[0, 2]], np.asarray(free.logprob)[[0, 2]])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5, "temperature": 2.0}])
def test_what_is_not_allowed_is_never_drawn_where_the_row_is_constrained(logits, settings):
    rows = 2000
    may = np.asarray([3, 17, 31])
    allowed = np.full((rows, 1), sum(1 << int(token) for token in may), np.uint32)
    position = np.arange(rows, dtype=np.int32)
    found = drawn(np.repeat(logits, rows, 0), position, allowed=allowed, constrained=[1, 0] * (rows // 2), **settings)
    assert set(np.asarray(found.token)[::2]) <= set(may)
    assert np.asarray(found.finite).all()
    free = drawn(np.repeat(logits, rows, 0), position, **settings)
    np.testing.assert_array_equal(np.asarray(found.token)[1::2], np.asarray(free.token)[1::2])


def test_a_row_of_nan_is_told_and_spoils_no_other():
    logits = np.random.default_rng(2).normal(size=(3, V)).astype(np.float32)
    clean = drawn(logits)
    logits[1, 4] = np.nan
    dirty = drawn(logits)
    assert list(np.asarray(dirty.finite)) == [True, False, True]
    np.testing.assert_array_equal(np.asarray(dirty.token)[[0, 2]], np.asarray(clean.token)[[0, 2]])


def test_checked_guesses_are_rejection_sampling():
    """100,000 draws from 16 tokens: by a guess from other scores and a check, what is said follows the model's own
    distribution, whatever was guessed; and so does the next token, among those accepted and those rejected alike."""
    rows, vocab = 100_000, 16
    draw_ = np.random.default_rng(3)
    model, next_, other = (np.float32(1.5 * draw_.normal(size=vocab)) for _ in range(3))
    other = (model + other / 3).astype(np.float32)
    how_ = how(rows, seed=list(range(rows)))
    free = np.full(rows, -1, np.int32)
    none = np.zeros((rows, vocab), np.int32), np.zeros((rows, vocab), np.float32), np.zeros((rows, 1), np.uint32)

    def tokens(logits, position):
        at = np.full(rows, position, np.int32)
        return np.asarray(drawing(np.tile(logits, (rows, 1)), how_, at, free, *none).token)

    guess, said, after = tokens(other, 5), tokens(model, 5), tokens(next_, 6)
    accepted = guess == said
    p, q = (allowed(logits)[1][np.argsort(allowed(logits)[0])] for logits in (model, other))
    assert (p * q).sum() + 0.1 < accepted.mean() <= np.minimum(p, q).sum() + 0.005, "1 - total variation is the most"
    p_next = allowed(next_)[1][np.argsort(allowed(next_)[0])]
    for drawn_, expected in ((said, p), (after[accepted], p_next), (after[~accepted], p_next)):
        count = np.bincount(drawn_, minlength=vocab)
        chi_square = ((count - expected * len(drawn_)) ** 2 / (expected * len(drawn_))).sum()
        assert chi_square < 37.7, "0.1 % of chi-square with 15 degrees of freedom"
