"""What a whole train step sends, read from the compiled program: two all-to-alls a layer each way, and no more."""

import dataclasses
import math
import re

import numpy as np
import pytest

from gshardx.sharding import MeshConfig, build_mesh
from tests.models.test_decoder import LENGTH, ROWS, compiled, model

CAPACITY, WIDTH, EXPERTS = 5, 16, 8  # ceil(1.25 * 2 * 16 / 8) slots
MESHES = [
    MeshConfig(expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(fsdp=2, expert=4),
    MeshConfig(expert=4, tensor=2),
    MeshConfig(data=4, expert=2),
    MeshConfig(fsdp=4, expert=2),
    MeshConfig(data=2, fsdp=2, expert=2),
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(fsdp=2, expert=2, tensor=2),
]


def collectives(hlo, op):
    """Result shapes, as (dtype, elements) pairs, and replica groups of each ``op`` in the program's text."""
    found = []
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) {op}(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            sizes = [(dtype, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in shapes]
            found.append((sizes, groups(line)))
    return found


def groups(line):
    """Device ids, a row a group, from any of XLA's notations: listed, an iota, or axes of a mesh."""
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\]\S*)", line)
    if iota:
        return numbered(iota.group(2)).reshape(integers(iota.group(1)))
    sizes, order, over = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line
    ).groups()
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    ids = (numbered(order) if order else np.arange(math.prod(shape.values()))).reshape(tuple(shape.values()))
    chosen = [list(shape).index(axis.strip().strip("'")) for axis in over.split(",")]
    return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, math.prod(ids.shape[at] for at in chosen))


def numbered(text):
    """``[2,4]T(1,0)``: device numbers in that shape, transposed."""
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    ids = np.arange(math.prod(integers(shape))).reshape(integers(shape))
    return ids.transpose(integers(order)) if order else ids


def integers(text):
    return [int(n) for n in text.split(",")]


def axes_of(device_groups, mesh_config):
    """The mesh axes along which the devices of a group differ."""
    ids = np.vectorize(lambda device: device.id)(build_mesh(mesh_config).devices)
    place = {int(i): at for at, i in np.ndenumerate(ids)}
    return {
        axis
        for group in device_groups
        for axis, at in zip(mesh_config.shape, zip(*(place[int(i)] for i in group), strict=True), strict=True)
        if len(set(at)) > 1
    }


def bytes_of(mesh_config, itemsize):
    """Slots that one device sends in one all-to-all: its groups' slots of every expert."""
    return ROWS // mesh_config.batch_shards * EXPERTS * CAPACITY * WIDTH * itemsize


WIDTHS = {"f32": 4, "u16": 2, "s32": 4}


def check_all_to_alls(hlo, mesh_config, itemsize=4):
    sent = collectives(hlo, "all-to-all")
    assert len(sent) == 4  # 2 in the forward scan's body, 2 in the backward's
    for sizes, device_groups in sent:
        assert sum(WIDTHS[dtype] * n for dtype, n in sizes) == bytes_of(mesh_config, itemsize)
        assert axes_of(device_groups, mesh_config) == {"expert"}
    assert not collectives(hlo, "ragged-all-to-all")


def check_all_gathers(hlo, mesh_config):
    """Parameters over fsdp, and nothing else: no token, gate or expert weight over ``expert``."""
    gathered = collectives(hlo, "all-gather")
    assert bool(gathered) == (mesh_config.fsdp > 1)
    for _, device_groups in gathered:
        assert axes_of(device_groups, mesh_config) == {"fsdp"}


@pytest.mark.parametrize(
    "mesh_config",
    [pytest.param(mesh, marks=[] if mesh == MESHES[0] else pytest.mark.slow) for mesh in MESHES],
    ids=str,
)
def test_every_mesh_sends_two_all_to_alls_each_way_of_the_formulas_bytes(mesh_config, capfd):
    hlo = compiled(model(), mesh_config)[-1].hlo
    check_all_to_alls(hlo, mesh_config)
    check_all_gathers(hlo, mesh_config)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"router": "switch", "top_k": 1, "capacity_factor": 2.5},
        {"router": "top_k", "router_options": {"groups": 4, "groups_kept": 2, "priority": "gate"}},
        {"router": "sigmoid_bias", "router_options": {"groups": 4, "groups_kept": 2}, "adaptive_balance": True},
        {"dispatcher": "einsum", "shared_hidden": 8, "shared": "residual"},
    ],
    ids=str,
)
def test_every_router_keeps_to_it(options):
    mesh_config = MeshConfig(data=2, expert=4)
    hlo = compiled(model(**options), mesh_config)[-1].hlo
    check_all_to_alls(hlo, mesh_config)
    check_all_gathers(hlo, mesh_config)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["gather", "einsum"])
def test_bfloat16_on_the_wire_halves_the_bytes_both_ways(dispatcher):
    mesh_config = MeshConfig(expert=8)
    check_all_to_alls(compiled(model(wire="bfloat16", dispatcher=dispatcher), mesh_config)[-1].hlo, mesh_config, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("dispatcher", "without", "repeated"), [("gather", 4, 6), ("ragged", 5, 8)])
def test_rematerialisation_repeats_no_all_to_all_if_it_keeps_what_arrived(dispatcher, without, repeated):
    found = {}
    for remat in ("keep_all_to_all", "full"):
        config = dataclasses.replace(model(dispatcher=dispatcher), remat=remat)
        hlo = compiled(config, MeshConfig(data=2, expert=4))[-1].hlo
        found[remat] = len(collectives(hlo, "all-to-all"))
        assert "rematted_computation" in hlo
    assert found == {"keep_all_to_all": without, "full": repeated}, "the names must be what makes the difference"


@pytest.mark.slow
@pytest.mark.parametrize(("option", "wire"), [("same", "f32"), ("bfloat16", "u16")])
def test_sorted_rows_travel_with_their_counts_and_room_for_the_worst_case(option, wire):
    mesh_config = MeshConfig(data=2, expert=4)
    sent = collectives(compiled(model(dispatcher="ragged", wire=option), mesh_config)[-1].hlo, "all-to-all")
    per_device = ROWS // mesh_config.batch_shards * LENGTH * 2  # all of its choices, to each of the others
    rows, counts = 4 * per_device * WIDTH, EXPERTS
    assert sorted(sum(n for _, n in sizes) for sizes, _ in sent) == [counts, rows, rows, rows, rows]
    assert {dtype for sizes, _ in sent for dtype, n in sizes if n > counts} == {wire}
