"""What to do about broken records and files: fail at the first, or skip and count them."""

from typing import Literal, NoReturn

from gshardx.errors import BadInput

Policy = Literal["fail", "skip"]
TOLD = 3
"""Faults of which the line is kept; the rest are only counted."""


class Faults:
    """Meets each broken record of one reading. ``count`` and the first ``lines`` tell what was skipped."""

    def __init__(self, policy: Policy = "fail") -> None:
        self.policy = policy
        self.count = 0
        self.lines: list[str] = []

    def met(self, line: str, error: Exception | None = None) -> None:
        """Note one more; ``line`` says which file, where in it, and what is wrong.

        Raises:
            BadInput: the policy is to fail.
        """
        if self.policy == "fail":
            fail(line, error)
        self.count += 1
        if len(self.lines) < TOLD:
            self.lines.append(line)

    @property
    def summary(self) -> str:
        """One line, empty if there were none."""
        if not self.count:
            return ""
        more = f"; and {self.count - len(self.lines)} more" if self.count > len(self.lines) else ""
        return f"data: skipped {self.count:,} broken: {'; '.join(self.lines)}{more}"


def fail(line: str, error: Exception | None = None) -> NoReturn:
    raise BadInput(f"{line}; or use data.on_error = skip") from error
