"""From a plan to the buffer that a call of the device is given."""

import numpy as np

from gshardx.infer.program import Sizes
from gshardx.infer.scheduler import Plan
from gshardx.infer.slots import SlotTables


def fill_step(given: dict[str, np.ndarray], plan: Plan, tables: SlotTables, sizes: Sizes) -> list[list[range]]:
    """For ``step``; returns the places in its result of each segment of each shard: one after the last of its tokens,
    and one after each token that a guess, or a token to be scored, follows."""
    given["sample_slot"][:] = sizes.slots
    given["longest"][...] = _pages(plan, 0, sizes)
    places: list[list[range]] = []
    most, samples = 0, 0
    for shard, segments in enumerate(plan.segments):
        tables.fill(given, shard, [one.sequence.slot for one in segments])
        at, drawing = 0, 0
        places.append([])
        for row, segment in enumerate(segments):
            sequence, start, length, draws, drafts, scored = segment
            known = sequence.tokens[start : min(start + length, sequence.known + drafts)]
            given["token"][shard, at : at + length] = -1
            given["token"][shard, at : at + len(known)] = known
            given["row"][shard, at : at + length] = row
            given["position"][shard, at : at + length] = np.arange(start, start + length)
            at += length
            own = range(drawing, drawing + segment.places)
            places[-1].append(own)
            given["sample"][shard, own.start : own.stop] = range(at - len(own), at)
            given["sample_row"][shard, own.start : own.stop] = row
            first = start + length + (not draws) - scored
            given["target"][shard, own.start : own.start + scored] = sequence.tokens[first : first + scored]
            if draws and not drafts:  # of guesses the host says which is the newest
                given["sample_slot"][shard, own.stop - 1] = sequence.slot
            drawing = own.stop
        most, samples = max(most, at), max(samples, drawing)
    given["tiles"][...] = -(-most // min(sizes.tile, given["token"].shape[1]))
    given["sample_tiles"][...] = -(-samples // min(sizes.tile, given["sample"].shape[1]))
    return places


def fill_decode(given: dict[str, np.ndarray], plan: Plan, tables: SlotTables, sizes: Sizes) -> None:
    """For ``decode``; the place of each segment in its result is its number."""
    given["token"][:] = -1
    given["longest"][...] = _pages(plan, plan.steps - 1, sizes)
    for shard, segments in enumerate(plan.segments):
        tables.fill(given, shard, [one.sequence.slot for one in segments])
        for row, (sequence, start, *_) in enumerate(segments):
            given["position"][shard, row] = start
            given["limit"][shard, row] = min(plan.steps, sequence.room)
            if not sequence.pending:
                given["token"][shard, row] = sequence.tokens[start]
    given["steps"][...] = given["limit"].max()


def _pages(plan: Plan, more: int, sizes: Sizes) -> int:
    """Of the longest sequence in the call, once each has ``more`` further tokens."""
    last = max(one.start + one.length for segments in plan.segments for one in segments)
    return min(-(-(last + more) // sizes.page_size), sizes.table)
