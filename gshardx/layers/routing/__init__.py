"""Who goes where: a router turns tokens into a Routing. One file a family."""

from gshardx.layers.routing.contract import Router, RouterStats, Routing
from gshardx.layers.routing.gshard import GShardRouter, SecondExpert

__all__ = ["GShardRouter", "Router", "RouterStats", "Routing", "SecondExpert"]
