"""A model as a checkpoint keeps it: what training writes and inference reads."""

from typing import Any

import jax

from gshardx.models.build import Variables

ITEMS = ("params", "router")


def items_of(variables: Variables) -> dict[str, Any]:
    """``params``, and ``router`` where routers carry a state: Orbax keeps no empty trees."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(variables.router))}
    return {"params": variables.params} | ({"router": leaves} if leaves else {})


def variables_of(items: dict[str, Any], like: Variables) -> Variables:
    """The inverse; ``like`` gives the structure of the routers' state."""
    router = items.get("router", {})
    leaves = [router[str(number)] for number in range(len(router))]
    return Variables(items["params"], jax.tree.unflatten(jax.tree.structure(like.router), leaves))
