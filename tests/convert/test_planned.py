"""The real models' config.json as the hub has them (tests/convert/configs): each is read without weights, and has as
many parameters as is published.

The configs hold the keys that say something of the model's shape. Totals are exact: the sizes of the hub's files, or
sums over the shapes of all tensors. Active parameters are as their publisher prints them, some rounded, some cut off;
who leaves the embedding's table out, of which a token reads one row, is marked.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from gshardx.cli import read_config
from gshardx.convert.__main__ import main
from gshardx.convert.planned import Counts, counts_of, describe
from gshardx.errors import BadInput
from gshardx.plan.__main__ import main as plan

CONFIGS = Path(__file__).parent / "configs"


class Published(NamedTuple):
    """total: parameters; unused: of experts that a token doesn't choose, layers x experts x numbers in one; said: what
    the publisher prints of the others, in billions; table: the embedding's is among these."""

    model_type: str
    total: int
    unused: int
    said: str
    table: bool = True


PUBLISHED = {
    "mixtral-8x7b": Published("mixtral", 46_702_792_704, 32 * 6 * 3 * 4096 * 14336, "12.9"),
    "mixtral-8x22b": Published("mixtral", 140_630_071_296, 56 * 6 * 3 * 6144 * 16384, "39.1"),
    "qwen1.5-moe-a2.7b": Published("qwen2_moe", 14_315_784_192, 24 * 56 * 3 * 2048 * 1408, "2.7"),
    "qwen3-30b-a3b": Published("qwen3_moe", 30_532_122_624, 48 * 120 * 3 * 2048 * 768, "3.3"),
    "qwen3-235b-a22b": Published("qwen3_moe", 235_093_634_560, 94 * 120 * 3 * 4096 * 1536, "22"),
    "olmoe-1b-7b": Published("olmoe", 6_919_161_856, 16 * 56 * 3 * 2048 * 1024, "1.3"),
    "llama-2-7b": Published("llama", 6_738_415_616, 0, "6.7"),
    "deepseek-v2-lite": Published("deepseek_v2", 15_706_484_224, 26 * 58 * 3 * 2048 * 1408, "2.4", table=False),
    "deepseek-v2": Published("deepseek_v2", 235_741_434_880, 59 * 154 * 3 * 5120 * 1536, "21"),
    "deepseek-v3": Published("deepseek_v3", 671_026_419_200, 58 * 248 * 3 * 7168 * 2048, "37"),
    # The publisher's 355 B of the first have its prediction layer, and no tables.
    "glm-4.5": Published("glm4_moe", 352_797_814_784, 89 * 152 * 3 * 5120 * 1536, "32", table=False),
    "glm-4.5-air": Published("glm4_moe", 106_852_245_504, 45 * 120 * 3 * 4096 * 1408, "12", table=False),
    # What reads images is beside it: both are the 109 B that are published.
    "llama-4-scout-text": Published("llama4_text", 107_769_861_120, 48 * 15 * 3 * 5120 * 8192, "17"),
    "gpt-oss-120b": Published("gpt_oss", 116_829_156_672, 36 * 124 * 24_891_840, "5.1", table=False),
    "phi-3.5-moe": Published("phimoe", 41_873_153_344, 32 * 14 * 3 * 4096 * 6400, "6.6"),
}


def test_there_is_a_config_of_each():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_real_model_has_the_published_number_of_parameters(name):
    published = PUBLISHED[name]
    layout = describe(CONFIGS / f"{name}.json")
    counts = counts_of(layout)
    assert layout.family.name == published.model_type
    # Biases of a router's choice are among its state here.
    assert counts.total == pytest.approx(published.total, rel=1e-7)
    assert counts.total - counts.active == published.unused
    printed = 1e-9 * (counts.active - (0 if published.table else counts.looked_up))
    unit = 10 ** len(published.said.partition(".")[2])
    assert float(published.said) in (round(printed * unit) / unit, math.floor(printed * unit) / unit)


def test_the_page_has_these_counts():
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    table = page.split("## How large is it?")[1].split("## Families")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines() if "_" not in line]
    said = {row[0].lower().replace(" ", "-"): row[1:] for row in rows if len(row) == 3 and row[1][:1].isdigit()}
    assert len(said) == 9
    for name, (total, active) in said.items():
        counts = counts_of(describe(CONFIGS / f"{name}.json"))
        assert (total, active.split(" ")[0]) == (f"{counts.total:,}", f"{counts.active:,}")
        if "(" in active:
            assert f"({counts.active - counts.looked_up:,} without the table)" in active


def test_a_table_that_is_the_output_too_is_not_only_looked_up(tmp_path):
    config = json.loads((CONFIGS / "olmoe-1b-7b.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tied, separate = (counts_of(describe(place)) for place in (tmp_path, CONFIGS / "olmoe-1b-7b.json"))
    assert tied == Counts(separate.total - 50304 * 2048, separate.active - 50304 * 2048, 0)
    assert str(tied) == "6,816,139,264 (6.82 B) parameters; a token meets 1,178,994,688 (1.18 B)"


@pytest.mark.slow
def test_the_planner_takes_what_is_written(tmp_path, capsys, settings_given_back):
    file = tmp_path / "plan.yaml"
    assert main(["--from", str(CONFIGS / "olmoe-1b-7b.json"), "--plan", str(file)]) == 0
    assert "olmoe: 6,919,161,856 (6.92 B) parameters; a token meets 1,282,017,280 (1.28 B)" in capsys.readouterr().out
    assert read_config(file).model == describe(CONFIGS / "olmoe-1b-7b.json").plan.config
    flags = ["--topology", "cpu:8", "--mesh.expert", "8", "--step", "decode", "--rows", "8", "--length", "64", "--json"]
    plan(["--config", str(file), *flags])  # whether it fits is up to this machine
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["active_parameters"]) == (6_919_161_856, 1_282_017_280)


def test_what_can_not_be_planned_is_one_line(tmp_path):
    (tmp_path / "there.yaml").write_text("")
    olmoe = str(CONFIGS / "olmoe-1b-7b.json")
    for flags, said in (
        (
            [olmoe, "--plan", str(tmp_path / "there.yaml")],
            r"there.yaml: can't be written \(File exists\); give another file",
        ),
        ([olmoe, "--plan", "x", "--verify"], "--plan x: reads no weights"),
        ([str(tmp_path), "--plan", "x"], "config.json: can't be read"),
    ):
        with pytest.raises(BadInput, match=said):
            main(["--from", *flags])
