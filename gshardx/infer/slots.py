"""What the host knows of each slot of the device, ready to be copied into a call's buffer."""

import numpy as np

from gshardx.infer.program import Sizes, row_fields
from gshardx.infer.request import SamplingParams
from gshardx.infer.scheduler import Sequence


class SlotTables:
    """Settings and pages of the sequence in each slot of each shard."""

    def __init__(self, sizes: Sizes) -> None:
        fields = row_fields(sizes, sizes.slots)
        self._values = {name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()}
        self._values["slot"][:] = np.arange(sizes.slots)
        self._owner: dict[tuple[int, int], tuple[Sequence, int]] = {}
        self._versions: dict[tuple[int, int], int] = {}

    def holds(self, sequence: Sequence) -> bool:
        """Whether it has been installed since it got its slot."""
        found = self._owner.get((sequence.shard, sequence.slot))
        return found is not None and found[0] is sequence and found[1] == sequence.runs

    def install(self, sequence: Sequence, params: SamplingParams, choice: int, ends: frozenset[int]) -> None:
        """Write a sequence's settings to its slot."""
        at = sequence.shard, sequence.slot
        self._owner[at] = (sequence, sequence.runs)
        self._versions.pop(at, None)
        for name, value in (
            ("temperature", params.temperature),
            ("top_k", params.top_k),
            ("top_p", params.top_p),
            ("min_p", params.min_p),
            ("repetition", params.repetition_penalty),
            ("presence", params.presence_penalty),
            ("frequency", params.frequency_penalty),
            ("seed", params.seed),
            ("choice", choice),
            ("biased", bool(params.logit_bias)),
            ("constrained", params.json_schema is not None),
            ("alternatives", max(params.logprobs or 0, params.prompt_logprobs or 0)),
        ):
            self._values[name][at] = value
        self._values["stop"][at] = -1
        self._values["stop"][at][: len(ends)] = sorted(ends)

    def refresh(self, sequence: Sequence) -> None:
        """Copy its pages, if they changed."""
        at, lease = (sequence.shard, sequence.slot), sequence.lease
        assert lease is not None
        if self._versions.get(at) != lease.version:
            pages = lease.pages
            self._values["table"][at][: len(pages)] = pages
            self._versions[at] = lease.version

    def fill(self, given: dict[str, np.ndarray], shard: int, slots: list[int]) -> None:
        """Put the rows of ``slots`` into a call's buffer, in this order."""
        for name, values in self._values.items():
            given[name][shard, : len(slots)] = values[shard, slots]
