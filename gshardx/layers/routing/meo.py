"""Merging experts into one (MEO; He et al., arXiv 2310.09832), for sequences: noisy top-k of a row, then one network.

    v = mean of the row's real tokens                     fp32
    H = v W_g + N(0, 1) softplus(v W_n)                   without noise at inference
    chosen: the k largest of H;  R = softmax of H over the chosen
    the row goes through one network with the weights sum_chosen R_e theta_e

The gate is that of :mod:`gshardx.layers.routing.noisy_top_k`, as in the authors' code, and so are the losses
``importance`` and ``load``, here over rows. "balance" is over the batch: within a row there is but one decision.
"""

from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import BalanceLoss
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.merging import MergingRouter, mean_of_stretches
from gshardx.layers.routing.noisy_top_k import NoisyTopKRouter


class MeoRouter(MergingRouter, NoisyTopKRouter):
    """Args: those of :class:`MergingRouter`."""

    LOSSES = {**NoisyTopKRouter.LOSSES, "balance": BalanceLoss(over="batch")}  # noqa: RUF012

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        means, some = mean_of_stretches(tokens, valid, tokens.shape[1])
        return self.merged(*self.decision(means, some, rng), valid, rng=rng)
