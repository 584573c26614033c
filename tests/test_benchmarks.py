"""The benchmarks of the MoE layer run, and the scaling study tells what it found; what they measure, nobody checks
here.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gshardx.cli import parse_config
from gshardx.sharding import MeshConfig
from gshardx.sharding.hlo import parse
from tests.children import environment

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def output(script, *arguments):
    """What a benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_of_the_layer():
    found = json.loads(output("moe_layer.py", "--part", "memory", "--small", "--json"))
    assert [row["s"] for row in found["rows"]] == [16, 64]
    shorter, longer = (row["gather bytes / (s k m 4)"] for row in found["rows"])
    assert longer <= 1.1 * shorter  # of the routing too: nothing grows with the square of s


@pytest.mark.sweep
def test_every_table_of_the_gpu_benchmark(tmp_path):
    printed = output("gpu.py", "--small", "--output", str(tmp_path / "tables.md"))
    titles = [line.removeprefix("### ").split(",")[0] for line in printed.splitlines() if line.startswith("### ")]
    assert titles == ["Device", "Measured ceilings", "Grouped matrix products", "MoE layers"]
    assert "measures nothing" in printed
    assert (tmp_path / "tables.md").read_text() == printed
    for layer in ("gather, capacity 1.0", "gather, capacity 1.25", "ragged, dropless"):
        assert f"| gshardx {layer}" in printed


@pytest.mark.slow
def test_the_data_benchmark_holds_every_packing_to_its_goal():
    printed = output("data.py", "--seconds", "0.3", "--tokens", "200000", "--sequence_length", "64")
    for packing in ("first_fit", "best_fit", "concatenate"):
        assert f"| {packing} | 64 |" in printed
    assert "goal: the pipeline's share of a step at 50,000 tokens/s at most 3 %" in printed


@pytest.mark.slow
def test_every_row_of_the_conversion_benchmark():
    printed = output("convert_cpu.py", "--small", "--rounds", "1")
    for way in ("in", "out"):
        assert f"| {way}: of the speed of copying |" in printed
        assert f"| {way}: memory above twice the largest tensor |" in printed
    assert "what came back is byte for byte what went in" in printed


@pytest.mark.sweep
def test_every_row_of_the_serving_benchmark(tmp_path):
    """But llama.cpp's, which is not there: the table says so."""
    flags = ("--small", "--seconds", "1", "--rounds", "1", "--llama_python", str(tmp_path / "none"))
    printed = output("serve_cpu.py", *flags, "--output", str(tmp_path / "table.md"))
    assert (tmp_path / "table.md").read_text() == printed
    (missing,) = [line for line in printed.splitlines() if "not measured" in line]
    assert missing.startswith("- llama.cpp's server: not measured: pip install 'llama-cpp-python[server]' gguf")
    for row in ("4 streams: tokens/s", "/health, 2 connections: requests/s", "at 80% of the capacity: TTFT p90 ms"):
        assert f"| {row} | " in printed
    assert "| programs compiled meanwhile | 0 |" in printed
    assert "measures nothing" in printed


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(
        **{name: importlib.import_module(name) for name in ("commands", "maxtext", "report", "shape")}
    )


def speed_row(tokens, **more):
    return {"tokens_per_second": tokens, "median_step_seconds": 1.0, "peak_bytes": 5e6, "others": "0%", **more}


def test_the_speed_table_compares_within_a_round_and_within_a_shape(benchmark_modules):
    report = benchmark_modules.report
    lines = [
        report.Line(
            "gshardx", "fine", 8, [speed_row(400.0, compile_seconds=2.0), speed_row(200.0, compile_seconds=4.0)]
        ),
        report.Line("MaxText", "fine", 8, [speed_row(100.0), speed_row(100.0)]),
        report.Line("gshardx", "coarse", 8, [speed_row(100.0), speed_row(100.0)]),
        report.Line("MaxText", "coarse", 8, [speed_row(100.0), speed_row(100.0)]),
        report.Line("Hugging Face", "fine", 1, report.NotMeasured("no torch | here")),
    ]
    title, _, *rows = report.speed_table(lines)
    assert [row.count("|") for row in rows] == [title.count("|")] * 5
    assert rows[0].startswith("| fine | 8 | gshardx | - | 300 | 1.000 | 3.0 | 5 | not reported | 0%, 0% |")
    assert "| 3.00 (2.00 to 4.00) |" in rows[1]
    assert rows[3].startswith("| coarse | 8 | MaxText | 1.00 |")
    assert rows[4].endswith("| not measured | | | | | | no torch / here |")
    assert list(report.speed_goals(lines)) == [
        "- goal, fine on 8 devices: 2.0 x MaxText; it is 3.00 x: reached",
        "- goal, coarse on 8 devices: 2.0 x MaxText; it is 1.00 x: missed",
        "- goal, fine on 1 device: 1.0 x Hugging Face: not measured",
    ]


def test_a_command_tells_its_last_line_and_the_memory_of_its_children():
    """Asked by a small process, as the benchmark is one: a child starts with what its parent has."""
    child = "subprocess.run([sys.executable, '-c', 'x = bytearray(200_000_000)'])"
    grow = f"import sys, subprocess; {child}; print(1); print(2)"
    asking = f"import sys; from commands import last_line; print(*last_line([sys.executable, '-c', {grow!r}]))"
    asked = subprocess.run([sys.executable, "-c", asking], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    line, peak = asked.stdout.split()
    assert line == "2"
    assert 200e6 < int(peak) < 250e6


def test_a_command_that_fails_tells_its_last_complaint(benchmark_modules):
    with pytest.raises(benchmark_modules.report.NotMeasured, match=r"^no such thing$"):
        benchmark_modules.commands.last_line([sys.executable, "-c", "raise SystemExit('first\\nno such thing')"])


def test_maxtext_is_told_the_shape_and_its_compile_time_is_heard(benchmark_modules, tmp_path):
    """A script in its place prints what it was given and compiles a step."""
    program = "import jax; jax.jit(lambda x: x @ x)(jax.numpy.ones((4, 4)))"
    script = tmp_path / "peer.sh"
    script.write_text(f'{sys.executable} -c "{program}"\necho "median_step_s=2.0 tokens_per_second=$#"\n')
    module, shapes = benchmark_modules.maxtext, benchmark_modules.shape
    row = module.measure(script, 8, 6, shapes.COARSE)
    assert row["tokens_per_second"] == 2 + len(module.arguments(shapes.COARSE, 8))
    assert 0 < row["compile_seconds"] < 60
    assert {"ici_expert_parallelism=4", "ici_data_parallelism=2"} < set(module.arguments(shapes.COARSE, 8))
    assert "shared_experts=1" in module.arguments(shapes.FINE, 1)
    with pytest.raises(benchmark_modules.report.NotMeasured, match="give --maxtext SCRIPT"):
        module.measure(tmp_path / "none.sh", 8, 6, shapes.FINE)


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def recorded(config="gshard/12l_128e", chips=8, seconds=30.0, plan=None, **changed):
    """A record of the scaling study; ``changed`` are facts of its plan."""
    layers, experts = (int(part[:-1]) for part in config.removeprefix("gshard/").split("_"))
    facts = {
        "fits": True, "parameters": 13_152_576_512, "active_parameters": 469_001_216, "moe_layers": 6,
        "memory": {
            "parameters": 2_000_000_000, "optimizer": 4_000_000_000, "gradients": 2_000_000_000,
            "activations": 500_000_000, "temporaries": 1_500_000_000, "kv_cache": 0, "peak": 10_000_000_000,
        },
        "flops_per_device": 1e13, "lower_seconds": 1.25, "compile_seconds": 20.0, "hlo_instructions": 9000,
        "program_bytes": 58_000_000, "predicted_step_seconds": 0.125, "tokens_per_second": 131_072.0,
        "mfu_bound": 0.5, "all_to_all_bytes_per_layer": 134_217_728.0,
    }  # fmt: skip
    return {
        "config": config, "chips": chips, "layers": layers, "experts": experts, "mesh": {"expert": chips},
        "command": "python -m gshardx.plan", "planner_seconds": seconds, "planner_peak_bytes": 2_100_000_000,
        "planner_cpu_seconds": 25.0,
        "cores": 2, "others": "3%", "versions": "jax 0.10.2, libtpu 0.0.42.1",
        "plan": facts | changed if plan is None else plan, "error": None,
    }  # fmt: skip


def cells(lines, number=0):
    """Of row ``number`` of a Markdown table, by column."""
    names, _, *rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return {name.strip(): value.strip() for name, value in zip(names, rows[number], strict=True)}


def test_a_row_of_the_scaling_study(scaling):
    first = cells(scaling.table("gshard", [recorded()]))
    assert (first["model"], first["parameters"], first["mesh"], first["fits"]) == (
        "12l_128e",
        "13.2 B",
        "expert 8",
        "yes",
    )
    assert (first["lower s"], first["compile s"], first["HLO instructions"]) == ("1.25", "20.0", "9,000")
    assert (first["memory GB"], first["of it"]) == ("10.0", "2.00 + 4.00 + 2.00 + 0.500 + 1.50")
    assert (first["all-to-all MB a layer"], first["predicted step s"], first["MFU at most"]) == ("134", "0.125", "50%")
    assert (first["planner s"], first["of CPU"], first["planner GB"]) == ("30.0", "25.0", "2.10")


def test_a_row_without_figures_says_why(scaling):
    names = ("compile_seconds", "hlo_instructions", "program_bytes", "predicted_step_seconds", "mfu_bound")
    kinds = dict.fromkeys(recorded()["plan"]["memory"]) | {"parameters": 10_000_000_000, "peak": 469_000_000_000}
    large = recorded(fits=False, memory=kinds, all_to_all_bytes_per_layer=None, **dict.fromkeys(names))
    failed = recorded() | {"plan": None, "error": "error: no | TPU compiler"}
    lines = list(scaling.table("gshard", [large, failed]))
    row = cells(lines)
    assert (row["fits"], row["memory GB"], row["of it"]) == ("does not fit", "469", "10.0 + ? + ? + ? + ?")
    assert row["compile s"] == row["HLO instructions"] == row["all-to-all MB a layer"] == ""
    assert cells(lines, 1)["fits"] == "no plan: error: no / TPU compiler"
    assert any("not measured" in line for line in scaling.goals([large, failed]))


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([(8, {}), (128, {"hlo_instructions": 9090})], "differ by at most 1 %; it is 1.00 %: reached"),
        ([(8, {}), (128, {"hlo_instructions": 9100})], "differ by at most 1 %; it is 1.11 %: missed"),
        ([(8, {})], "differ by at most 1 %; not measured"),
        ([(8, {}), (2048, {"compile_seconds": 29.0})], "over that for 8 at most 1.5 x; it is 1.45 x: reached"),
        ([(8, {}), (2048, {"compile_seconds": 31.0})], "over that for 8 at most 1.5 x; it is 1.55 x: missed"),
        ([(8, {}), (512, {"compile_seconds": 99.0})], "at most 1.5 x; not measured"),
    ],
    ids=str,
)
def test_goals_over_numbers_of_chips(scaling, records, told):
    lines = list(scaling.goals([recorded(chips=chips, **changed) for chips, changed in records]))
    assert sum(told in line for line in lines) == 1


@pytest.mark.parametrize(("peak", "verdict"), [(10.9e9, "9.00 %: reached"), (11.7e9, "17.0 %: missed")])
def test_memory_goal_compares_chips_that_each_hold_one_expert(scaling, peak, verdict):
    memory = recorded()["plan"]["memory"]
    one_each = [recorded(chips=128), recorded("gshard/12l_2048e", 2048, memory=memory | {"peak": peak})]
    others = [recorded(chips=8, memory=memory | {"peak": 30e9}), recorded("gshard/36l_2048e", 2048)]
    (line,) = [line for line in scaling.goals([*others, *one_each]) if "memory of a chip" in line]
    assert verdict in line
    assert f"{peak / 1e9:.2f} GB with 2,048" in line


@pytest.mark.parametrize(("seconds", "verdict"), [(119.0, "119 s: reached"), (121.0, "121 s: missed")])
def test_time_goal_is_the_600b_s_on_2048_chips(scaling, seconds, verdict):
    records = [recorded("gshard/36l_2048e", 512, 500.0), recorded("gshard/36l_2048e", 2048, seconds)]
    (line,) = [line for line in scaling.goals(records) if "600B" in line]
    assert verdict in line


def test_an_interrupted_study_goes_on_where_it_was(scaling, monkeypatch, tmp_path):
    """Cases with a plan are not run again; one without is. Each is a process, whose exit code is read."""
    facts = recorded()["plan"] | {
        "collectives": [
            {"op": "all-to-all", "axes": ["expert"], "count": 12, "bytes_per_device": 600},
            {"op": "all-reduce", "axes": ["data"], "count": 1, "bytes_per_device": 7},
        ]
    }
    program = f"import sys; print({json.dumps(json.dumps(facts))}); sys.exit(CODE)"
    codes = {8: 0, 32: 4, 128: 1}
    monkeypatch.setattr(
        scaling, "command", lambda case: [sys.executable, "-c", program.replace("CODE", str(codes[case.chips]))]
    )
    out, cases = tmp_path / "study.jsonl", [scaling.Case("gshard/12l_128e", chips) for chips in codes]
    records = scaling.study(cases, out, limit=60.0)
    assert [record["plan"] is None for record in records] == [False, False, True]
    assert records[2]["error"] == "ended with code 1, without a word"
    assert records[0]["plan"]["all_to_all_bytes_per_layer"] == 100
    again = scaling.study(cases, out, limit=60.0)
    assert again[:2] == records[:2]
    assert len(out.read_text().splitlines()) == 4  # the failed one twice


def test_a_process_s_largest_memory_is_read():
    """From a process of its own: what the kernel counts of a child begins with the memory of the one that forked it."""
    script = (
        "import sys, scaling; "
        "code, out, _, used = scaling.measured([sys.executable, '-c', \"x = b'x' * 10**9; print(3)\"], limit=60.0); "
        "print(code, out.strip(), used.ru_maxrss * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    code, out, peak = done.stdout.split()
    assert (code, out) == ("0", "3")
    assert 1e9 < int(peak) < 2e9


def test_a_case_that_takes_too_long_is_stopped(scaling, monkeypatch):
    monkeypatch.setattr(scaling, "command", lambda case: [sys.executable, "-c", "import time; time.sleep(60)"])
    record = scaling.run(scaling.Case("gshard/12l_128e", 8), limit=0.5)
    assert record["plan"] is None
    assert record["error"].startswith("stopped after")


def test_the_tables_go_between_the_page_s_markers(scaling):
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text()
    once = scaling.filled(page, "scaling", "first\n")
    assert scaling.filled(once, "scaling", "second\n") == once.replace("\nfirst\n", "\nsecond\n")
    begin, end = "<!-- scaling:begin -->", "<!-- scaling:end -->"
    assert once == f"{page.split(begin)[0]}{begin}\nfirst\n{end}{page.split(end)[1]}"
    with pytest.raises(SystemExit, match="no <!-- scaling:begin -->"):
        scaling.filled("no markers", "scaling", "first")


def test_meshes_of_the_study(scaling):
    """Small models get all chips on the expert axis; larger ones as many on fsdp as their state needs."""
    assert scaling.widest_mesh(64, 6 * 10**9, 10**9, 2048, 128) == MeshConfig(fsdp=2, expert=64)
    assert scaling.widest_mesh(128, 227 * 10**9, 8 * 10**9, 4096, 128) == MeshConfig(fsdp=8, expert=16)
    assert scaling.widest_mesh(8, 45 * 10**9, 2 * 10**9, 4096, 2048) == MeshConfig(data=4, fsdp=64, expert=8)
    for config in ("gshard/12l_512e", "models/deepseek_v3"):
        for chips in (8, 2048):
            command = scaling.command(scaling.Case(config, chips))
            file, flags = BENCHMARKS.parent / command[4], command[8:]
            planned, _ = parse_config("scaling", "", [f"--config={file}", *flags])
            assert planned.mesh.size == chips
            assert planned.train.batch_size == chips * (2 if config.startswith("gshard") else 1)


@pytest.fixture
def scaling_ops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling_ops")


RECORDED = BENCHMARKS.parent / "tests" / "sharding" / "hlo"


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.txt")), ids=lambda file: file.stem)
def test_instructions_are_counted_as_the_planner_counts_them(scaling_ops, file):
    assert scaling_ops.count(file.read_text()) == parse(file.read_text()).instructions > 0


def test_stages_are_told_where_programs_part(scaling_ops):
    shared = [("JAX's own program", 10, 10), ("fold", 9, 9), ("tpu-spmd-partitioning", 200, 202), ("fuse", 300, 315)]
    after = [("schedule", 300, 316), ("remat", 300, 370), ("copy", 301, 371), ("last", 400, 455)]
    left, right = ([scaling_ops.Stage(one[0], one[side]) for one in (*shared, *after)] for side in (1, 2))
    left.insert(5, scaling_ops.Stage("only here", 7))
    told = [name for name, _, _ in scaling_ops.partings(left, right)]
    assert told == ["JAX's own program", "tpu-spmd-partitioning", "schedule", "remat", "last"]


def test_instructions_that_one_program_has_more_of(scaling_ops):
    text = (RECORDED / "tpu_v5e_fused.txt").read_text()
    line = next(line for line in text.splitlines() if " fusion(" in line and " = " in line)
    less, more = parse(text), parse(text.replace(line, f"{line}\n{line.replace(' = ', '.again = ', 1)}"))
    by_op = lambda _, one: one.op  # noqa: E731
    assert scaling_ops.differing(less, less, by_op) == "none"
    assert scaling_ops.differing(less, more, by_op) == "fusion +1"
    assert scaling_ops.differing(more, less, by_op) == "fusion -1"


def test_compiling_stops_behind_the_partitioner(scaling_ops, monkeypatch, tmp_path):
    """The stand-in for the planner writes what XLA would, where XLA is told to, and then takes an hour."""
    program = """
import os, pathlib, re, time
folder = pathlib.Path(re.search(r"--xla_dump_to=(\\S+)", os.environ["XLA_FLAGS"]).group(1))
folder.mkdir(parents=True)
(folder / "m.jit_train.c.0001.x.after_tpu-spmd-partitioning.before_dce.txt").write_text("  a = f32[] add(b, c)\\n" * 3)
(folder / "m.jit_train.c.0002.x.after_dce.before_cse.txt").write_text("")
time.sleep(3600)
"""
    monkeypatch.setattr(scaling_ops, "SHAPES", {8: "2x2x2", 32: "2x4x4"})
    monkeypatch.setattr(scaling_ops, "command", lambda case: [sys.executable, "-c", program])
    lines = list(scaling_ops.partitioned_table(["gshard/12l_128e"], scaling_ops.Dumps(tmp_path)))
    assert cells(lines) == {"model": "12l_128e", "8 chips": "3", "32 chips": "3", "%": "0.00"}
    assert any("at most 1 %; it is 0 %: reached" in line for line in lines)


@pytest.mark.parametrize("text", ["12l_128e", "12l_128e:8", "12l_129e:8,32"])
def test_a_pair_that_does_not_exist_is_bad_input(scaling_ops, monkeypatch, text):
    monkeypatch.setattr(scaling_ops, "configs", lambda: {"12l_128e": "gshard/12l_128e"})
    assert scaling_ops.pair("12l_128e:8,32") == ("gshard/12l_128e", (8, 32))
    with pytest.raises(argparse.ArgumentTypeError, match=r"CONFIG:CHIPS,CHIPS|no config 12l_129e; there are 12l_128e"):
        scaling_ops.pair(text)


@pytest.mark.sweep
def test_the_imbalance_suite():
    printed = output("imbalance.py", "--small", "--part", "routers", "--routers", "switch", "base")
    cells = {line.split("|")[1].strip(): line.split("|")[2:] for line in printed.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in cells["base"][:6]] == ["0%, 1.0"] * 6
    drops = dict(zip(cells["router"], (cell.split("%")[0].strip() for cell in cells["switch"]), strict=False))
    assert int(drops[" hot expert "]) > 80 > int(drops[" burst "]) > int(drops[" even "])
    printed = output("imbalance.py", "--small", "--part", "dispatcher", "--dispatcher", "gather", "--rounds", "1")
    assert printed.count("| gather |") == 6
    assert "measures nothing" in printed
