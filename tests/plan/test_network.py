"""Times of collectives, against worked examples, against links counted one by one, and as properties."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.plan.network import _exchange_load, seconds, wraps
from gshardx.sharding.chips import CHIPS
from gshardx.sharding.collectives import OPS

SLICES = [
    ("v5e", (4, 4)),
    ("v5e", (16, 16)),
    ("v5p", (8, 16, 16)),
    ("v5p", (2, 2, 3)),
    ("tpu7x", (4, 4, 4)),
    ("h100", ()),
]


def instant(name):
    """The chip without latency, so that bytes alone take time."""
    return dataclasses.replace(CHIPS[name], hop_seconds=0.0)


operations = st.sampled_from(OPS)
networks = st.sampled_from(SLICES)
groups = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3)
sizes = st.floats(0, 1e12)


@given(operations, networks, groups, st.booleans(), sizes, sizes)
def test_more_bytes_take_longer(op, network, group, crosses, one, other):
    name, torus = network
    less, more = (seconds(op, size, group, CHIPS[name], torus, crosses) for size in sorted((one, other)))
    assert 0 <= less <= more < math.inf


@given(operations, networks, st.booleans())
def test_a_device_alone_sends_nothing(op, network, crosses):
    name, torus = network
    assert seconds(op, 1e9, (1, 1), CHIPS[name], torus, crosses) == 0


@given(networks, groups, st.booleans(), sizes)
def test_gathering_pieces_is_scattering_the_whole(network, group, crosses, piece):
    name, torus = network
    chip, count = CHIPS[name], math.prod(group)
    gathered = seconds("all-gather", piece, group, chip, torus, crosses)
    scattered = seconds("reduce-scatter", piece * count, group, chip, torus, crosses)
    assert gathered == pytest.approx(scattered)
    assert seconds("all-reduce", piece * count, group, chip, torus, crosses) == pytest.approx(2 * scattered)


@given(operations, networks, st.sampled_from([2, 4, 8, 16]))
def test_crossing_slices_takes_longer(op, network, count):
    name, torus = network
    inside, across = (seconds(op, 1e9, [count], instant(name), torus, crosses) for crosses in (False, True))
    assert across > inside


def test_an_unknown_operation():
    with pytest.raises(ValueError, match="broadcast: not a collective"):
        seconds("broadcast", 1, [2], CHIPS["v5e"], (4, 4), False)


def _counted_load(extent, ring):
    """The slow twin of _exchange_load: every pair's piece on its way, link by link."""
    load = {}

    def send(start, step, distance, share):
        for k in range(distance):
            link = (start + step * k) % extent, step
            load[link] = load.get(link, 0) + share / extent

    for start in range(extent):
        for end in range(extent):
            ahead, back = (end - start) % extent, (start - end) % extent
            if not ring:
                send(start, 1 if end > start else -1, abs(end - start), 1)
            elif ahead == back:  # half way round: half of the piece each way
                send(start, 1, ahead, 0.5)
                send(start, -1, back, 0.5)
            else:
                send(start, 1 if ahead < back else -1, min(ahead, back), 1)
    return max(load.values())


@pytest.mark.parametrize("extent", range(2, 13))
@pytest.mark.parametrize("ring", [False, True])
def test_the_fullest_link_of_an_exchange(extent, ring):
    assert _exchange_load(extent, ring) == pytest.approx(_counted_load(extent, ring))


def test_which_dimensions_wrap():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    assert wraps((8, 16), v5e) == (False, True)
    assert wraps((4, 4), v5e) == (False, False)
    assert wraps((4, 4, 8), v5p) == (True, True, True)
    assert wraps((2, 2, 4), v5p) == (False, False, False)
    assert wraps((), CHIPS["h100"]) == ()


def test_the_scaling_books_gather_over_a_row():
    """Quiz 2 of its chapter on sharding: 4 chips of a v5e slice that doesn't wrap, 3 hops of 8.4 MB over one link."""
    chip = instant("v5e")
    row = seconds("all-gather", 8.4e6, [4], chip, (1, 4), False)
    assert row == pytest.approx(3 * 8.4e6 / chip.ici_bandwidth)


def test_the_scaling_books_ring():
    """An array of V bytes over a ring: all-gather in V / W and all-to-all in V / 4W, W a link's both directions."""
    chip, whole = instant("v5e"), 1e9
    both = 2 * chip.ici_bandwidth
    ring = (16, 1)
    assert seconds("all-gather", whole / 16, [16], chip, ring, False) == pytest.approx(whole / both * 15 / 16)
    assert seconds("all-to-all", whole / 16, [16], chip, ring, False) == pytest.approx(whole / both / 4)


def test_a_group_takes_the_box_that_serves_it_best():
    """16 chips of an 8 x 16 x 16 torus: a 4 x 4 square exchanges faster than a row would."""
    chip = instant("v5p")
    square = 1e9 * _exchange_load(4, False) / chip.ici_bandwidth
    assert seconds("all-to-all", 1e9, [16], chip, (8, 16, 16), False) <= square
    assert seconds("all-to-all", 1e9, [16], chip, (1, 1, 16), False) > square


def test_exchanges_grow_as_gshard_measured():
    """arXiv 2006.16668 section 4.2: from 16 to 2,048 partitions of a 2D torus all-to-all takes 9 times as long."""
    chip = CHIPS["v6e"]
    small, large = (seconds("all-to-all", 1e8, [math.prod(torus)], chip, torus, False) for torus in [(4, 4), (32, 64)])
    assert 4.5 < large / small < 18


def test_gathers_do_not_grow_with_a_whole_torus():
    """Bandwidth-optimal: a sum of as many bytes takes as long on 64 chips as on 2,048."""
    chip = instant("v5p")
    small, large = (
        seconds("all-reduce", 1e9, [math.prod(torus)], chip, torus, False) for torus in [(4, 4, 4), (8, 16, 16)]
    )
    assert large == pytest.approx(small, rel=0.02)


def test_a_switch():
    chip = instant("h100")
    assert seconds("all-to-all", 8e9, [8], chip, (), False) == pytest.approx(7e9 / 450e9)
    assert seconds("all-gather", 1e9, [8], chip, (), False) == pytest.approx(7e9 / 450e9)
    assert seconds("collective-permute", 9e9, [8], chip, (), False) == pytest.approx(0.02)


def test_hosts_exchange_by_their_own_nics():
    """4 hosts of 8: 3/4 of the operand by a 50 GB/s NIC, then 7/8 by NVLink."""
    chip = instant("h100")
    assert seconds("all-to-all", 8e9, [32], chip, (), True, slices=4) == pytest.approx(6e9 / 50e9 + 7e9 / 450e9)


def test_a_sum_over_slices_sends_only_shards_between_them():
    """Reduce inside, sum 1/16 across, gather inside: 2 x (1/16)(1/2) of the operand over the network outside."""
    chip = instant("v5e")
    inside = seconds("all-reduce", 1e9, [16], chip, (4, 4), False)
    both = seconds("all-reduce", 1e9, [2, 16], chip, (4, 4), True, slices=2)
    assert both - inside == pytest.approx(1e9 / 16 / chip.dcn_bandwidth)


def test_two_devices_of_one_chip():
    """They exchange inside the chip; in larger groups they share its links."""
    chip = instant("tpu7x")
    assert seconds("all-to-all", 1e9, [2], chip, (2, 2, 1), False) < 1e9 / 2 / chip.ici_bandwidth
    assert seconds("all-gather", 1e9, [8], chip, (2, 2, 1), False) >= 2e9 * 3 / (2 * chip.ici_bandwidth)
