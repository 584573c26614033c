"""Rematerialisation by name: what the backward pass makes again to save memory, and what it keeps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from gshardx.layers.dispatch import ALL_TO_ALL_RESULTS

_keep = jax.checkpoint_policies
_arrived = _keep.save_only_these_names(*ALL_TO_ALL_RESULTS)
_again = partial(jax.checkpoint, prevent_cse=False)  # a scan's body is not merged with its own repetition

REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda step: step,
    "dots": partial(_again, policy=_keep.save_from_both_policies(_keep.dots_saveable, _arrived)),
    "keep_all_to_all": partial(_again, policy=_arrived),
    "offload": partial(
        _again,
        policy=_keep.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(ALL_TO_ALL_RESULTS),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
    "full": _again,
}
"""What is kept of a unit of blocks, from most memory to least: everything; the results of matrix products and what
arrived by all-to-all; only the latter; the same, in the host's memory until it is needed; nothing but the unit's input.
Only the last sends all-to-alls again."""
