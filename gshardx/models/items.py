"""A model as a checkpoint keeps it: what training writes and inference reads."""

from typing import Any

import jax

from gshardx.models.build import Variables


def weights_item(averaged: bool) -> str:
    """The name of the weights: of the last step, or averaged over the steps (``optimizer.ema_decay``)."""
    return "ema" if averaged else "params"


def items_of(variables: Variables, averaged: bool = False) -> dict[str, Any]:
    """The weights by their name, and ``router`` where routers carry a state: Orbax keeps no empty trees."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(variables.router))}
    return {weights_item(averaged): variables.params} | ({"router": leaves} if leaves else {})


def variables_of(items: dict[str, Any], like: Variables, averaged: bool = False) -> Variables:
    """The inverse; ``like`` gives the structure of the routers' state."""
    router = items.get("router", {})
    leaves = [router[str(number)] for number in range(len(router))]
    return Variables(items[weights_item(averaged)], jax.tree.unflatten(jax.tree.structure(like.router), leaves))
