"""Panels of expert load: every window and expert is seen, the dead and the overloaded above all."""

import base64
import json
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.report.heatmap import CELLS, COLUMNS, EDGE, ROWS, heat_maps, resample, rows_of
from gshardx.report.picture import DARK, LEVELS, LIGHT, levels, palette, png
from gshardx.report.read import Load, read_run
from tests.report.runs import write_run


def decoded(data):
    """Levels [row, column] of a PNG with one byte a pixel and no filter."""
    width, height = struct.unpack(">II", data[16:24])
    body = data[data.index(b"IDAT") + 4 : -16]
    return np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, width + 1)[:, 1:]


def panels(html):
    """Each panel's data, its loads as [row, column]."""
    found = []
    for text in re.findall(r'<script type="application/json">(.*?)</script>', html):
        data = json.loads(text)
        cells = np.frombuffer(base64.b64decode(data["load"]), "<u2") / 100
        found.append(data | {"load": cells.reshape(len(data["rows"]), data["columns"])})
    return found


def test_a_picture_is_a_png_with_its_levels():
    grid = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = png(grid, LIGHT)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    np.testing.assert_array_equal(decoded(data), grid)


def test_balance_is_the_middle_and_no_load_the_end():
    assert levels(np.array([0.0, 0.5, 1.0, 2.0, 4.0, 100.0])).tolist() == [0, 15, 30, 45, 60, 60]


@pytest.mark.parametrize("stops", [LIGHT, DARK])
def test_less_and_more_differ_in_blue_and_the_middle_is_grey(stops):
    colours = np.frombuffer(palette(stops), np.uint8).reshape(LEVELS, 3).astype(int)
    assert np.ptp(colours[LEVELS // 2]) < 12
    assert (colours[: LEVELS // 2 - 3, 2] > colours[: LEVELS // 2 - 3, 0]).all()
    assert (colours[LEVELS // 2 + 4 :, 0] > colours[LEVELS // 2 + 4 :, 2]).all()


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 50))
def test_resampling_keeps_the_mean_of_even_windows(windows, limit, apart):
    draw = np.random.default_rng(windows)
    values = draw.random((windows, 2, 3))
    grid = resample(Load(np.arange(1, windows + 1) * apart, values), limit)
    assert len(grid.values) == min(windows, limit)
    assert grid.values.min() >= values.min()
    assert grid.values.max() <= values.max()
    if windows <= limit:
        np.testing.assert_allclose(grid.values, values)


def test_a_long_window_fills_all_the_columns_it_spans():
    values = np.array([1.0, 2.0, 3.0])[:, None, None]
    grid = resample(Load(np.array([10, 20, 100]), values), 200)
    assert grid.values[:, 0, 0].tolist() == [1, 2] + [3] * 8
    assert resample(Load(np.array([10, 20, 100]), values), 4).values[:, 0, 0].tolist() == [1.5, 3, 3, 3]
    assert grid.span == (0, 100)


def test_up_to_64_experts_have_a_row_each_in_order():
    assert rows_of(np.ones((5, 64))) == [[expert] for expert in range(64)]


@pytest.mark.parametrize("experts", [65, 100, 256, 1000])
def test_more_experts_share_rows_but_not_the_busiest_and_the_idlest(experts):
    load = np.random.default_rng(experts).random((20, experts))
    load[-4:, 7], load[-4:, 8] = 50.0, 0.0
    rows = rows_of(load)
    assert len(rows) == ROWS
    assert sorted(expert for row in rows for expert in row) == list(range(experts))
    assert rows[0] == [7]
    assert [8] in rows[-EDGE:]
    assert all(len(row) == 1 for row in rows[:EDGE] + rows[-EDGE:])


def test_dead_experts_stay_dead_rows_however_many_there_are(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=100, layers=1, experts=256, collapsed=True))
    (panel,) = panels(heat_maps([run]))
    now = panel["load"][:, -5:]
    assert (now[:2] == 128.0).all()
    assert (now[2:] == 0.0).all()
    assert "254 of 256 dead" in heat_maps([run])


def test_a_panel_tells_its_loads_to_the_hundredth(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=60, layers=2, experts=8))
    for layer, panel in enumerate(panels(heat_maps([run]))):
        np.testing.assert_allclose(panel["load"], run.load.values[:, layer].T, atol=0.00501)
        assert panel["span"] == [0, 60]


def test_two_runs_lie_side_by_side_and_lacking_layers_leave_room(tmp_path):
    one = read_run(write_run(tmp_path / "one", steps=30, layers=3))
    two = read_run(write_run(tmp_path / "two", steps=30, layers=2))
    html = heat_maps([one, two])
    order = re.findall(r'<div></div>|chip r(\d)">\w+</span> <b>MoE layer (\d)', html)
    assert order == [("0", "0"), ("1", "0"), ("0", "1"), ("1", "1"), ("0", "2"), ("", "")]


def test_many_layers_make_fewer_columns():
    load = Load(np.arange(1, 401), np.ones((400, 60, 128)))
    found = panels(heat_maps([SimpleNamespace(load=load, name="wide")]))
    assert len(found) == 60
    assert sum(panel["load"].size for panel in found) <= CELLS
    assert 40 <= found[0]["columns"] < COLUMNS
