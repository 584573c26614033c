"""Plots: a file comes out, and each mistake gets its line."""

import importlib.util
import subprocess
import sys

import pytest

from gshardx.errors import BadInput
from gshardx.plan.plots import check_plot, plot
from tests.plan.tiny import planned, refused

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_plot_is_written(tmp_path, suffix, starts):
    file = tmp_path / f"plan{suffix}"
    plot(planned("forward")[0], file)
    assert file.read_bytes().startswith(starts)
    assert file.stat().st_size > 5000


def test_both_bars_are_named(tmp_path):
    file = tmp_path / "plan.svg"
    plot(planned("train")[0], file)
    text = file.read_text()
    for word in ("memory, GiB", "predicted step, ms", "parameters", "optimizer", "sending", "train on cpu:8"):
        assert f"<!-- {word}" in text


def test_what_does_not_fit_is_drawn_without_time(tmp_path, monkeypatch):
    plan = refused(monkeypatch)
    file = tmp_path / "plan.svg"
    plot(plan, file)
    assert "<!-- memory, GiB" in file.read_text()
    assert "predicted step" not in file.read_text()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("plan.bmq", "no format of that suffix; use .png, .svg or .pdf"),
        ("plan", "no format of that suffix"),
        ("absent/plan.png", "no folder"),
    ],
)
def test_a_file_that_cannot_be_written_gets_a_line(tmp_path, name, line):
    with pytest.raises(BadInput) as error:
        check_plot(tmp_path / name)
    assert str(error.value).startswith(f"--plot {tmp_path / name}: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "plan.png").mkdir()
    with pytest.raises(BadInput, match="can't be written"):
        plot(planned("forward")[0], tmp_path / "plan.png")


def test_without_matplotlib_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"--plot needs matplotlib; run: pip install 'gshardx\[plan\]'"):
        check_plot(tmp_path / "plan.png")


def test_matplotlib_is_loaded_only_to_draw():
    script = "import sys, gshardx.plan.__main__, gshardx.plan.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
