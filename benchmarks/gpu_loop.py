"""Timing on an accelerator: many calls inside one compiled program, so that launches cost nothing."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from timing import seconds_of

Row = dict[str, Any]
Function = Callable[..., Any]
ENOUGH_SECONDS = 10.0
"""After so many no further round starts: something that slow is not worth the card's time."""


class NotAvailable(Exception):
    """Why something did not run."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """How to time, and the FLOP/s that shares refer to."""

    iterations: int
    rounds: int
    ceiling: float = float("nan")

    def seconds(self, function: Function, x: jax.Array, *rest: Any) -> float:
        """Of one call: the median over rounds, after one that does not count.

        Raises:
            NotAvailable: whatever kept it from running.
        """
        try:
            loop = _repeated(function, self.iterations)
            seconds_of(lambda: loop(x, *rest))
            rounds: list[float] = []
            while len(rounds) < self.rounds and sum(rounds) < ENOUGH_SECONDS:
                rounds.append(seconds_of(lambda: loop(x, *rest)))
        except NotAvailable:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            raise NotAvailable(f"{type(error).__name__}: {reason}") from error
        return statistics.median(rounds) / self.iterations

    def columns(self, function: Function, flops: float, backward: bool, x: jax.Array, *rest: Any) -> Row:
        """Forward, and forward with gradients of the first two arguments, which is three times the work."""
        row, reasons = rates("fwd", None, flops, self.ceiling) | rates("fwd+bwd", None, flops, self.ceiling), {}
        runs = {"fwd": (function, flops), "fwd+bwd": (with_gradients(function), 3 * flops)}
        for direction, (run, work) in runs.items():
            if direction == "fwd" or backward:
                try:
                    row |= rates(direction, self.seconds(run, x, *rest), work, self.ceiling)
                except NotAvailable as reason:
                    reasons.setdefault(str(reason), []).append(direction)
        note = "; ".join(f"{' and '.join(which)} not available: {reason}" for reason, which in reasons.items())
        return row | {"note": note}


def rates(direction: str, seconds: float | None, flops: float, ceiling: float) -> Row:
    names = (f"{direction} ms", f"{direction} TFLOP/s", f"{direction} %")
    values = (1e3 * seconds, 1e-12 * flops / seconds, 100 * flops / seconds / ceiling) if seconds else (None,) * 3
    return dict(zip(names, values, strict=True))


@functools.cache
def with_gradients(function: Function) -> Function:
    """``function``, then the gradients of its first two arguments; each result is its own cotangent."""

    def both(x: jax.Array, params: Any, *rest: Any) -> Any:
        out, pull = jax.vjp(lambda x, params: function(x, params, *rest), x, params)
        return out, pull(out)

    return both


@functools.cache
def _repeated(function: Function, times: int) -> Function:
    """``times`` calls; one element of each one's x depends, by next to nothing, on what the last computed."""

    def run(x: jax.Array, *rest: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            x, last = carry
            seen = sum(leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(last))
            x = x.at[(0,) * x.ndim].add((1e-30 * seen).astype(x.dtype))
            return x, function(x, *rest)

        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, x, *rest))
        return jax.lax.fori_loop(0, times, body, (x, nothing))

    return jax.jit(run)


def drawn(shape: tuple[int, ...], scale: float = 1.0, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Normal random numbers; never zeros, on which matrix products are faster than on data."""

    def some(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return scale * jax.random.normal(key, shape, dtype)

    def draw(key: jax.Array) -> jax.Array:
        if len(shape) < 3:
            return some(key, shape)
        # One expert after the other: the random bits of all of them would not fit beside DeepSeek-V3's.
        return jax.lax.map(lambda key: some(key, shape[1:]), jax.random.split(key, shape[0]))

    return jax.block_until_ready(jax.jit(draw)(jax.random.key(seed)))
