"""The house keeps its rules: floors import downwards, files stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gshardx"
FLOORS = {
    "sharding": 1, "config": 2, "layers": 2, "models": 3, "data": 3, "checkpoint": 3, "train": 4, "infer": 4, "plan": 5,
    "report": 5, "convert": 5,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(file):
    """The parts of gshardx that a file imports, by their first name."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("gshardx."):
                yield name.split(".")[1]


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != PACKAGE], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_floor_imports_only_floors_below_it(file):
    own = file.relative_to(PACKAGE).parts[0]
    for other in set(imported(file)) & FLOORS.keys():
        assert other == own or FLOORS[other] < FLOORS[own], f"{own} imports {other}"
    if own in ("sharding", "layers"):
        assert not {"config", "cli"} & set(imported(file))


def test_only_the_store_knows_orbax():
    knows = [
        str(f.relative_to(PACKAGE)) for f in FILES if "import orbax" in f.read_text() or "from orbax" in f.read_text()
    ]
    assert knows == ["checkpoint/store.py"]


def test_files_stay_under_400_lines():
    assert [f for f in FILES if f.read_text().count("\n") > 400] == []


def test_the_moe_core_stays_small():
    layers = PACKAGE / "layers"
    core = [
        layers / "routing" / "contract.py",
        *(layers / "dispatch").glob("*.py"),
        layers / "balance.py",
        layers / "moe.py",
    ]
    assert sum(file.read_text().count("\n") for file in core) < 900
    assert [f for f in (layers / "routing").glob("*.py") if f.read_text().count("\n") > 150] == []
