"""The command in real processes."""

import os
import re
import resource
import subprocess
import sys

import pytest

from tests.report.runs import write_run


def report(folder, *arguments, options=()):
    command = [sys.executable, *options, "-m", "gshardx.report", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "one", steps=50)
    write_run(folder / "two", steps=30, seed=1)
    return folder


def test_it_writes_beside_the_run_and_prints_where(folder):
    done = report(folder, "one")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{os.path.join('one', 'report.html')}\n", "")
    assert (folder / "one" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_two_runs_are_compared_and_out_names_the_file(folder):
    assert report(folder, "one", "two").stdout == f"{os.path.join('one', 'compare.html')}\n"
    assert report(folder, "one", "two", "--out", "here.html").stdout == "here.html\n"
    assert (folder / "here.html").read_bytes() == (folder / "one" / "compare.html").read_bytes()


def test_runs_of_one_name_go_by_their_paths(folder):
    write_run(folder / "other" / "one", steps=20)
    assert report(folder, "one", "other/one", "--out", "same.html").returncode == 0
    title = re.search(r"<title>(.*?)</title>", (folder / "same.html").read_text(encoding="utf-8"))[1]
    assert title == "one and other/one: training report"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["one", "nowhere"], "nowhere: no such folder"),
        (["."], "metrics.jsonl: no such file"),
        (["one", "--out", "no/such/folder.html"], "can't be written"),
        (["one", "--out", "two"], "two: can't be written"),
        ([], "required: RUN_DIR"),
        (["one", "two", "three"], "unrecognized arguments: three"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(folder, arguments, words):
    done = report(folder, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_it_starts_without_jax(folder):
    done = report(folder, "--help", options=["-X", "importtime"])
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"jax", "jaxlib", "flax", "jsonargparse", "rich", "matplotlib"}


@pytest.mark.slow
def test_a_long_run_is_a_small_page_in_seconds(tmp_path):
    folder = write_run(tmp_path / "short", steps=1000, layers=4, experts=128, sources=("a", "b"))
    body = [line.split(",", 1)[1] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, 100_001):
            out.write(f'{{"step": {step},{body[step % len(body)]}\n')
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = report(tmp_path, "short")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 10
    assert (folder / "report.html").stat().st_size < 3e6
