"""Rotary position embedding (RoFormer, arXiv 2104.09864), and how it is stretched to longer texts than it learned."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gshardx.errors import BadInput

Scaling = Literal["none", "linear", "llama3", "yarn", "longrope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Pair i of r / 2 turns by ``base**(-2i/r)`` radians a position, unless ``scaling`` changes that.

    Attributes:
        base: of the slowest rotation.
        width: r, even: how many of a head's first entries turn; None: all.
        interleaved: pairs are neighbours, (x[2i], x[2i+1]), as in RoFormer; else (x[i], x[i + r/2]), as in GPT-NeoX.
        scaling: linear: positions are divided by ``factor`` (arXiv 2306.15595); llama3: those of slow pairs are
            (arXiv 2407.21783's models); yarn: the same with other bounds, and ``magnitude`` (arXiv 2309.00071);
            longrope: pair i's are divided by ``factors[i]`` (arXiv 2402.13753).
        factor: how many times longer texts may be.
        original_length: positions that the model learned with: llama3, yarn; longrope: says what ``factors`` are for.
        low, high: turns within ``original_length`` below which a pair is stretched, and above which it is not; in
            between both are mixed. YaRN's alpha and beta are 1 and 32, Llama 3's low and high factors 1 and 4, Llama
            4's 1 and 1.
        truncate: yarn: round the two pairs at these bounds outwards to whole ones.
        factors: longrope: one a pair.
        magnitude: factor on what turns, and on its scores squared; None: yarn has ``0.1 ln(factor) + 1``, others 1.
    """

    base: float = 10_000.0
    width: int | None = None
    interleaved: bool = False
    scaling: Scaling = "none"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 32.0
    truncate: bool = True
    factors: list[float] | None = None
    magnitude: float | None = None

    def __post_init__(self) -> None:
        if self.width is not None and (self.width < 2 or self.width % 2):
            raise BadInput(f"width = {self.width}: rotary positions turn pairs; use {max(2, self.width + 1)}")
        if self.scaling in ("linear", "llama3", "yarn") and self.factor < 1:
            raise BadInput(f"factor = {self.factor}: must be 1 or more")
        if self.scaling in ("llama3", "yarn") and self.original_length < 1:
            raise BadInput(f"original_length = {self.original_length}: {self.scaling} needs it; use what was trained")
        if not 0 < self.low <= self.high or (self.low == self.high and self.scaling != "llama3"):
            raise BadInput(f"low = {self.low}, high = {self.high}: must be above 0, and low below high")
        if (self.factors is None) != (self.scaling != "longrope"):
            raise BadInput(f"factors = {self.factors} are of scaling longrope, one a pair; scaling = {self.scaling}")

    def frequencies(self, head_dim: int) -> Float[np.ndarray, "pair"]:
        """Radians that each pair turns from one position to the next, fp32.

        Raises:
            BadInput: more than ``head_dim`` entries would turn, or ``factors`` are not as many as pairs.
        """
        width = self.width or head_dim
        if width > head_dim:
            raise BadInput(f"width = {width} is more than the head's {head_dim}; use {head_dim} or less")
        pair = np.arange(width // 2)
        plain = self.base ** (-2 * pair / width)
        if self.scaling == "linear":
            plain = plain / self.factor
        elif self.scaling == "longrope":
            if len(self.factors or ()) != width // 2:
                raise BadInput(
                    f"factors: {len(self.factors or ())} of them; {width} entries that turn need {width // 2}"
                )
            plain = plain / np.asarray(self.factors)
        elif self.scaling == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            plain = _mixed(plain, self.factor, np.clip((turns - self.low) / (self.high - self.low or 1e-9), 0, 1))
        elif self.scaling == "yarn":
            plain = _mixed(plain, self.factor, 1 - self._ramp(width))
        return plain.astype(np.float32)

    def _ramp(self, width: int) -> Float[np.ndarray, "pair"]:
        """0 for pairs that keep their speed to 1 for those that are stretched, over pairs' numbers (YaRN eq. 18)."""

        def pair_that_turns(times: float) -> float:
            return width * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(self.base))

        first, last = pair_that_turns(self.high), pair_that_turns(self.low)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        return np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0, 1)

    @property
    def scale(self) -> float:
        """``magnitude``, or what stands for it."""
        if self.magnitude is not None:
            return self.magnitude
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0


def _mixed(plain: Float[np.ndarray, "pair"], factor: float, kept: Float[np.ndarray, "pair"]) -> np.ndarray:
    return plain * kept + plain / factor * (1 - kept)


def rotate(x: Float[Array, "b t n d"], positions: Int[Array, "b t"], rope: Rope) -> Float[Array, "b t n d"]:
    """Turn the pairs of each head's first entries. Computed in fp32, returned as given, pairs where they were."""
    frequency = rope.frequencies(x.shape[-1])
    half = len(frequency)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if rope.scale != 1:
        cos, sin = cos * rope.scale, sin * rope.scale
    turning, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    pairs, axis = ((half, 2), -1) if rope.interleaved else ((2, half), -2)
    first, second = jnp.unstack(turning.reshape(*x.shape[:-1], *pairs), axis=axis)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return jnp.concatenate([turned.reshape(turning.shape).astype(x.dtype), rest], axis=-1)
