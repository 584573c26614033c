"""Switch routing (arXiv 2101.03961, section 2.1): each token goes to its single best expert.

    p = softmax((x * U(1 - jitter, 1 + jitter)) W)        fp32; jitter in training only
    y = p_i E_i(x) with i = argmax p                      not renormalised, so that the router learns
    balance = E * sum_e f_e p_e, first choices counted before any is dropped

The paper's capacity is 1.25 in training and 2.0 in evaluation: ``Capacity(1.25, evaluation=2.0)``. The default here is
dropless evaluation, as everywhere in gshardx.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import Gating
from gshardx.layers.draws import draw
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter


class SwitchRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (k is 1):

    jitter: half-width of the noise on the router's input; 0.01 is the paper's.
    """

    def __init__(self, width: int, num_experts: int, *, jitter: float = 0.01, **common: Any) -> None:
        super().__init__(width, num_experts, 1, **common)
        self.jitter = jitter

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        if rng is not None and self.jitter > 0:
            uniform = partial(jax.random.uniform, minval=1 - self.jitter, maxval=1 + self.jitter)
            noise = draw(uniform, rng, tokens.shape)
            tokens = tokens.astype(noise.dtype) * noise
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        experts = top_k(logits, 1)
        return self.route(Gating(logits, gates, experts, valid), take(gates, experts), rng=rng)
