"""A text of unknown domain read by every domain's expert at once (DEMix, arXiv 2108.05036 section 4).

    p(x_t | x_<t) = sum_d p(x_t | x_<t, d) p(d | x_<t)
    p(d | x_<t) in proportion to p(d) p(x_<t | d)         Bayes' rule: who has foretold the text best counts most

Each text is n rows of a batch, one behind each domain's tag.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers import DemixRouter, Packed
from gshardx.models.build import Blueprint, Variables
from gshardx.models.decode import DecodeState, Sampling, abstract_state, extend, sample
from gshardx.models.generator import SamplingOptions


def mixed(
    log_p: Float[Array, "b n t"], prior: Float[Array, "n"]
) -> tuple[Float[Array, "b t"], Float[Array, "b t_and_1 n"]]:
    """Log probability of each token under the mixture, and log p(d | what is before) for each token and the next one.

    Args:
        log_p: of each token under each of n domains, given the tokens before it.
        prior: log p(d).
    """
    start = jnp.broadcast_to(prior[:, None], (*log_p.shape[:2], 1))
    total = start + jnp.cumsum(jnp.pad(log_p, ((0, 0), (0, 0), (1, 0))), axis=-1)
    of_all = jax.nn.logsumexp(total, axis=1)
    return jnp.diff(of_all, axis=-1), (total - of_all[:, None]).swapaxes(1, 2)


class DomainMixture:
    """Scores and continues texts under the mixture of a ``demix`` model's domains.

    Args:
        blueprint: the model.
        variables: its values, on ``mesh``.
        mesh: where to run; the rows of all domains of all texts divide over its batch shards.
        length: longest text, tokens, its tag included.
        prior: p(d) before anything is read, one a domain; None: all alike.

    Raises:
        BadInput: the model's router is another one, or the prior has another length.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        variables: Variables,
        mesh: Mesh,
        *,
        length: int,
        prior: Sequence[float] | None = None,
    ) -> None:
        router: Any = blueprint.bind(blueprint.params).stack.router
        if not isinstance(router, DemixRouter):
            raise BadInput(f"model.moe.router = {blueprint.config.moe.router}: domains are mixed where it is demix")
        n = len(router.tags)
        if prior is not None and len(prior) != n:
            raise BadInput(f"prior has {len(prior)} domains, but the model has {n}; give one probability a domain")
        self._tags, self._blueprint, self._variables = np.asarray(router.tags, np.int32), blueprint, variables
        self._mesh, self._length = mesh, length
        chance = np.full(n, 1 / n) if prior is None else np.asarray(prior) / np.sum(prior)
        self._prior = jnp.log(jnp.asarray(chance, jnp.float32))
        self._score = jax.jit(partial(_score, blueprint))
        self._extend = jax.jit(partial(extend, blueprint), donate_argnums=1)
        self._draw = jax.jit(partial(_draw, blueprint), donate_argnums=1)

    def score(
        self, texts: Int[np.ndarray, "b t"], valid: Bool[np.ndarray, "b t"] | None = None
    ) -> tuple[Float[np.ndarray, "b t"], Float[np.ndarray, "b t_and_1 n"]]:
        """Log probability of each token, and the chance of each domain before each token and after the last one.

        Padding (``valid`` False, behind the text) is given probability 1.

        Raises:
            BadInput: texts are longer than ``length`` allows.
        """
        valid = np.ones(texts.shape, bool) if valid is None else valid
        if texts.shape[1] + 1 > self._length:
            raise BadInput(f"texts of {texts.shape[1]} tokens and a tag are over the length of {self._length}")
        log_p, chances = self._score(self._variables, *self._tagged(texts, valid), self._prior)
        return np.asarray(log_p), np.exp(np.asarray(chances))

    def generate(
        self,
        prompts: Int[np.ndarray, "b t"],
        max_new_tokens: int,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    ) -> Int[np.ndarray, "b n"]:
        """New tokens of each prompt; chances of domains go on being brought up to date with each of them.

        Raises:
            BadInput: prompts and new tokens do not fit.
        """
        (b, t), n = prompts.shape, len(self._tags)
        if t + 1 + max_new_tokens > self._length:
            raise BadInput(f"prompts of {t} tokens, a tag and {max_new_tokens} new ones: over {self._length}")
        chances = jnp.log(jnp.asarray(self.score(prompts)[1][:, -1]))
        abstract = abstract_state(self._blueprint, b * n, self._length, self._mesh)
        state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract)
        rows, count = self._tagged(prompts, np.ones(prompts.shape, bool))[0], np.full(b * n, t + 1, np.int32)
        state = self._extend(self._variables, state, rows, count)
        how = Sampling(
            jnp.full(b, options.temperature, jnp.float32),
            jnp.full(b, options.top_k, jnp.int32),
            jnp.full(b, options.top_p, jnp.float32),
            jnp.full(b, options.seed, jnp.uint32),
        )
        drawn = []
        for _ in range(max_new_tokens):
            state, chances, tokens = self._draw(self._variables, state, chances, how)
            drawn.append(np.asarray(tokens))
        return np.stack(drawn, axis=1)

    def _tagged(
        self, texts: Int[np.ndarray, "b t"], valid: Bool[np.ndarray, "b t"]
    ) -> tuple[Int[np.ndarray, "b_n t_and_1"], Bool[np.ndarray, "b_n t_and_1"]]:
        """Each text n times, once behind each tag."""
        n = len(self._tags)
        tags = np.tile(self._tags, len(texts))[:, None]
        rows = np.concatenate([tags, np.repeat(texts, n, axis=0)], axis=1).astype(np.int32)
        return rows, np.concatenate([np.ones(tags.shape, bool), np.repeat(valid, n, axis=0)], axis=1)


def _score(
    blueprint: Blueprint,
    variables: Variables,
    rows: Int[Array, "b_n t"],
    valid: Bool[Array, "b_n t"],
    prior: Float[Array, "n"],
) -> tuple[Array, Array]:
    model = blueprint.bind(variables.params)
    places = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    packed = Packed.of(valid.astype(jnp.int32))
    hidden, _, _ = model.hidden(rows, places, valid, packed, None, variables.router)
    log_p = jax.nn.log_softmax(model.logits(hidden[:, :-1]), axis=-1)
    of_next = jnp.take_along_axis(log_p, rows[:, 1:, None], axis=-1)[..., 0]
    known = jnp.where(valid[:, 1:], of_next, 0.0)
    return mixed(known.reshape(-1, len(prior), known.shape[1]), prior)


def _draw(
    blueprint: Blueprint, variables: Variables, state: DecodeState, chances: Float[Array, "b n"], how: Sampling
) -> tuple[DecodeState, Float[Array, "b n"], Int[Array, "b"]]:
    """Append a token to each text, in all its rows."""
    b, n = chances.shape
    log_p = jax.nn.log_softmax(state.logits, axis=-1).reshape(b, n, -1)
    together = jax.nn.logsumexp(chances[..., None] + log_p, axis=1)
    tokens = sample(together, how, state.length[::n])
    told = chances + jnp.take_along_axis(log_p, tokens[:, None, None], axis=-1)[..., 0]
    one_each = jnp.repeat(tokens, n)[:, None]
    state = extend(blueprint, variables, state, one_each, jnp.ones(b * n, jnp.int32))
    return state, jax.nn.log_softmax(told, axis=-1), tokens
