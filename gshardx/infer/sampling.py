"""Drawing tokens on the device, each row by its own settings, which are arrays: no value compiles anything anew.

A row's token is a function of its logits, its seed, its choice number and its position: Gumbel noise from those three
is added to the scores, and the best one taken. So a draw is the same in any batch; and a draft token that equals it
may be kept, which is rejection sampling (arXiv 2211.17192) for drafts that are certain of their token: it is kept with
the probability that the model gives it, and the text is the one drawn without drafts.

Nothing is sorted. Where to cut is found by bisection on the bits of the scores: 32 passes over a row, exact.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

TOP = 20
"""Alternatives that are reported at most; OpenAI's limit."""
FORBIDDEN = -1e30
"""Score of a token that may not be drawn: below any other, and finite, so that what is not finite is a fault."""


class Draw(NamedTuple):
    """How each row draws. Temperature 0 takes the best token; the values named in brackets change nothing."""

    temperature: Float[Array, "s"]
    top_k: Int[Array, "s"]
    """Keep the k best, and what equals the last of them (0)."""
    top_p: Float[Array, "s"]
    """Then the smallest set of best ones whose probability reaches p (1.0)."""
    min_p: Float[Array, "s"]
    """Then those of at least this share of the best one's probability (0.0)."""
    repetition: Float[Array, "s"]
    """Divide positive, multiply negative logits of tokens in prompt or output (1.0; CTRL, arXiv 1909.05858)."""
    presence: Float[Array, "s"]
    """Subtract from tokens in the output (0.0; OpenAI)."""
    frequency: Float[Array, "s"]
    """Subtract as often as they are there (0.0; OpenAI)."""
    seed: UInt32[Array, "s"]
    choice: UInt32[Array, "s"]
    """Number of the continuation among those of one prompt."""
    biased: Int[Array, "s"]
    """Whether to add the row's bias."""
    constrained: Int[Array, "s"]
    """Whether only the row's allowed tokens may be drawn."""
    alternatives: Int[Array, "s"]
    """How many of the best tokens to report."""


class Context(NamedTuple):
    """What a row's scores depend on beside its logits."""

    history: Int[Array, "s v"]
    """Twice the count of each token in the output, plus 1 if it is in the prompt."""
    bias: Float[Array, "s v"]
    """Added to the logits."""
    allowed: UInt32[Array, "s words"]
    """Bit i % 32 of word i // 32: whether token i may be drawn, where the row is constrained."""


class Drawn(NamedTuple):
    token: Int[Array, "s"]
    logprob: Float[Array, "s"]
    """Of the token, by the model alone: before penalties, bias and temperature."""
    best: Int[Array, "s top"]
    """The most probable tokens, and ``best_logprob``; zeros where no row asked for any."""
    best_logprob: Float[Array, "s top"]
    finite: Bool[Array, "s"]
    """Whether the scores were; the token of a row where they were not means nothing."""


def draw(
    logits: Float[Array, "s v"],
    how: Draw,
    position: Int[Array, "s"],
    target: Int[Array, "s"],
    look_up: Callable[[], Context],
) -> Drawn:
    """One token a row.

    Args:
        logits: fp32.
        how: settings.
        position: that the token will have in its sequence.
        target: the token itself where it is known already, and only its log-probability is not; -1: draw it.
        look_up: fetches what penalties and biases need; only called on where a row has some.
    """
    changed = (how.repetition != 1) | (how.presence != 0) | (how.frequency != 0) | (how.biased > 0)
    changed |= how.constrained > 0
    scores = jax.lax.cond(changed.any(), lambda: _changed(logits, how, look_up()), lambda: logits)
    finite = jnp.isfinite(scores).all(-1)
    greedy = how.temperature == 0
    drawn = jax.lax.cond((~greedy).any(), _noisy, lambda scores, how, position: scores, scores, how, position)
    token = jnp.where(target < 0, _best(jnp.where(greedy[:, None], scores, drawn)), target)
    total = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    top = min(TOP, logits.shape[-1])

    def nothing(logits: Array) -> tuple[Array, Array]:
        return jnp.zeros((len(logits), top), jnp.float32), jnp.zeros((len(logits), top), jnp.int32)

    def best_of(logits: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, top)
        return values, ids

    values, best = jax.lax.cond((how.alternatives > 0).any(), best_of, nothing, logits)
    return Drawn(token, logprob, best, values - total[:, None], finite)


def _best(scores: Float[Array, "s v"]) -> Int[Array, "s"]:
    """The first of the highest, in two passes: XLA's CPU compiler vectorises these and no argmax (jax 0.10), as
    ``benchmarks/moe_layer.py --part choice`` shows of routers."""
    v = scores.shape[-1]
    at = jnp.where(scores == scores.max(-1, keepdims=True), jnp.arange(v, dtype=jnp.int32), v)
    return jnp.minimum(at.min(-1), v - 1)  # a row of NaN has no highest


def _changed(logits: Float[Array, "s v"], how: Draw, context: Context) -> Float[Array, "s v"]:
    factor = jnp.where(context.history > 0, how.repetition[:, None], 1.0)
    count = (context.history // 2).astype(jnp.float32)
    scores = jnp.where(logits > 0, logits / factor, logits * factor)
    scores = scores - how.presence[:, None] * (count > 0) - how.frequency[:, None] * count
    scores = scores + jnp.where(how.biased[:, None] > 0, context.bias, 0.0)
    token = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    allowed = (context.allowed[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1 > 0
    return jnp.where(allowed | (how.constrained[:, None] == 0), scores, FORBIDDEN)


def _noisy(scores: Float[Array, "s v"], how: Draw, position: Int[Array, "s"]) -> Float[Array, "s v"]:
    """Scores whose maximum is a draw from the distribution that temperature and cuts leave."""
    scaled = scores / jnp.maximum(how.temperature, 1e-6)[:, None]
    cuts = (how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0)
    lowest = jax.lax.cond(cuts.any(), _cut, lambda s, _: jnp.full(len(s), -jnp.inf), scaled, how)

    def noise(seed: Array, choice: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), position)
        return jax.random.gumbel(key, scores.shape[1:])

    gumbel = jax.vmap(noise)(how.seed, how.choice, position)
    return jnp.where(scaled >= lowest[:, None], scaled + gumbel, -jnp.inf)


def _cut(scaled: Float[Array, "s v"], how: Draw) -> Float[Array, "s"]:
    """The lowest score that each row may draw."""
    key = _ordered_bits(scaled)
    best = scaled.max(-1)
    v = scaled.shape[-1]
    k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, v), v).astype(jnp.float32)
    by_rank = _largest_reaching(key, jnp.ones_like(scaled), k)
    kept = jnp.where(key >= by_rank[:, None], jnp.exp(scaled - best[:, None]), 0.0)
    # A little less than p of the sum, so that rounding of the sum itself lets nothing beyond 1.0 be asked for.
    wanted = jnp.maximum(how.top_p, 1e-30) * kept.sum(-1) * (1 - 1e-6)  # more than nothing, which any key reaches
    by_mass = jnp.where(how.top_p < 1, _largest_reaching(key, kept, wanted), by_rank)
    share = jnp.log(jnp.maximum(how.min_p, 1e-30))
    lowest = _from_ordered_bits(jnp.maximum(by_rank, by_mass))
    return jnp.minimum(jnp.maximum(lowest, jnp.where(how.min_p > 0, best + share, -jnp.inf)), best)


def _largest_reaching(
    key: UInt32[Array, "s v"], weight: Float[Array, "s v"], wanted: Float[Array, "s"]
) -> UInt32[Array, "s"]:
    """The largest key for which the keys from it upwards weigh ``wanted`` or more; 0 where all weigh less."""

    def narrow(bit: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        enough = jnp.where(key >= tried[:, None], weight, 0.0).sum(-1) >= wanted
        return jnp.where(enough, tried, found)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros(len(key), jnp.uint32))


def _ordered_bits(x: Float[Array, "s v"]) -> UInt32[Array, "s v"]:
    """Integers that are ordered as the floats are."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(key: UInt32[Array, "s"]) -> Float[Array, "s"]:
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
