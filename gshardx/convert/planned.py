"""A public model without its weights: how many parameters it has, and the config that ``gshardx.plan`` takes."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

from gshardx.cli import config_yaml
from gshardx.config import Config
from gshardx.convert.families import family_of
from gshardx.convert.rules import STATE
from gshardx.convert.source import Layout, layout_of, read_config, understood
from gshardx.errors import BadInput
from gshardx.models.count import count_parameters
from gshardx.sharding import MeshConfig, build_mesh


class Counts(NamedTuple):
    """Parameters, exactly, from shapes.

    Attributes:
        total: of the files; a prediction layer beyond the last (DeepSeek-V3's) is not counted.
        active: that one token meets: all but the experts that it does not choose.
        looked_up: of these, the embedding's table, of which it meets one row; 0 where the table is the output's, too.
    """

    total: int
    active: int
    looked_up: int

    def __str__(self) -> str:
        less = f", {_said(self.active - self.looked_up)} without the embedding's table" if self.looked_up else ""
        return f"{_said(self.total)} parameters; a token meets {_said(self.active)}{less}"


def _said(count: int) -> str:
    return f"{count:,} ({count / 1e9:.2f} B)" if count >= 1e7 else f"{count:,}"


def describe(source: Path) -> Layout:
    """The model of a directory with config.json, or of such a file; files of weights are not looked at, nor how the
    numbers in them are packed.

    Raises:
        BadInput: none there, or an architecture or option that we lack.
    """
    config = read_config(source)
    config.pop("quantization_config", None)
    family = family_of(config, f"{source}")
    model = understood(config, family, f"{source}")
    assert model.vocab_size is not None, "every family sets it"
    return layout_of(family, model, model.vocab_size, build_mesh(MeshConfig()))


def counts_of(layout: Layout) -> Counts:
    """How many parameters a public model has."""
    plan = layout.plan
    # What no tensor has, such as the router of a dense model's one expert, is no parameter of theirs.
    beside = sum(math.prod(layout.shapes[name][0]) for name, _ in layout.zeros if not name.startswith(STATE))
    total, active = (count_parameters(plan, active=one) - beside for one in (False, True))
    return Counts(total, active, 0 if plan.config.tie_embeddings else plan.vocab * plan.config.width)


def write_plan(source: Path, target: Path) -> None:
    """Write the config of a run with the model that ``source`` describes, for ``python -m gshardx.plan --config``.

    Args:
        source: as for :func:`describe`.
        target: a YAML file that is not there.

    Raises:
        BadInput: see :func:`describe`; or the file is there, or can't be written.
    """
    layout = describe(source)
    text = config_yaml(dataclasses.replace(Config(), model=layout.plan.config))
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f"--plan {target}: can't be written ({error.strerror}); give another file") from error
    print(f"{layout.family.name}: {counts_of(layout)}")
    print(f"wrote {target}, for python -m gshardx.plan --config {target} --topology NAME --mesh.AXIS N")
