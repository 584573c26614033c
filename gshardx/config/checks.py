"""Rules that values of a config keep; each breach is one line with a value that would work."""

import math

from gshardx.errors import BadInput


def positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{section}.{name} = {value}: must be above 0 and finite")


def at_least_zero(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise BadInput(f"{section}.{name} = {value}: must be 0 or more, and finite")


def share(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise BadInput(f"{section}.{name} = {value}: must be 0 or more and below 1")


def divisor(of: int, at_most: int) -> int:
    """The largest divisor of ``of`` that is ``at_most`` or less."""
    return next(n for n in range(min(of, max(at_most, 1)), 0, -1) if of % n == 0)
