"""How tokens travel: a dispatcher is a value with two verbs, dispatch and combine."""

from gshardx.layers.dispatch.auto import Auto, Choice, choose_dispatcher
from gshardx.layers.dispatch.carry import ALL_TO_ALL_RESULTS
from gshardx.layers.dispatch.contract import Dispatcher, Rows, Slots
from gshardx.layers.dispatch.ragged import Ragged
from gshardx.layers.dispatch.slots import Einsum, Gather

__all__ = [
    "ALL_TO_ALL_RESULTS",
    "Auto",
    "Choice",
    "Dispatcher",
    "Einsum",
    "Gather",
    "Ragged",
    "Rows",
    "Slots",
    "choose_dispatcher",
]
