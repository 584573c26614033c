"""The parameter table: every figure is that of the arrays themselves."""

import contextlib
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh, describe, replicate, shard, split

CUBE = build_mesh(MeshConfig(data=2, expert=2, tensor=2))


class Model(nnx.Module):
    def __init__(self, rngs):
        def drawn(*shape, dtype=jnp.float32):
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype))

        self.w_in = shard(drawn(2, 4, 6, 8), "layer expert embed hidden")
        self.w_out = split(drawn(8, 5, dtype=jnp.bfloat16), 0, "tensor")
        self.both = shard(drawn(8), PartitionSpec(("data", "tensor")))
        self.scale = replicate(drawn())
        self.noise = nnx.Rngs(0)  # no parameter: not shown
        self.seen = nnx.BatchStat(jnp.zeros(3))


def model():
    return Model(nnx.Rngs(0))


def placed():
    with jax.set_mesh(CUBE):
        return model()


def the_trees():
    module = placed()
    state = nnx.state(module, nnx.Param)
    arrays = nnx.to_pure_dict(state)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)
    return {"module": module, "state": state, "arrays": arrays, "shapes": shapes}


@pytest.mark.parametrize("form", ["module", "state", "arrays", "shapes"])
def test_bytes_are_those_of_the_shards(form):
    trees = the_trees()
    rows = {row.name: row for row in describe(trees[form]).rows}
    assert set(rows) == {"w_in", "w_out", "both", "scale"}
    for name, array in trees["arrays"].items():
        row = rows[name]
        assert {row.bytes_per_device} == {piece.data.nbytes for piece in array.addressable_shards}
        assert row.shard_shape == array.addressable_shards[0].data.shape
        assert (row.shape, row.dtype, row.total_bytes) == (array.shape, str(array.dtype), array.nbytes)
    arrays = trees["arrays"].values()
    description = describe(trees[form])
    assert description.total_bytes == sum(a.nbytes for a in arrays)
    assert description.bytes_per_device == sum(a.addressable_shards[3].data.nbytes for a in arrays)
    assert description.parameters == sum(a.size for a in arrays)


def test_a_mesh_that_is_given_shows_where_parameters_would_live():
    abstract = nnx.eval_shape(model)
    for form in (abstract, model(), nnx.state(abstract, nnx.Param)):
        assert describe(form, CUBE).rows == describe(placed()).rows
        assert all(row.layout == "whole" for row in describe(form).rows)
    with jax.set_mesh(CUBE):
        assert describe(abstract).rows == describe(placed()).rows
    assert describe(placed(), build_mesh(MeshConfig())).bytes_per_device == describe(model()).bytes_per_device
    assert describe(abstract, CUBE.abstract_mesh).rows == describe(placed()).rows


def test_an_annotation_that_does_not_fit_names_the_parameter():
    with pytest.raises(BadInput, match=r"^w_in \[2, 4, 6, 8\] .*expert = 4 does not divide over mesh axis expert = 8"):
        describe(model(), build_mesh(MeshConfig(expert=8)))


def test_the_text_has_a_line_a_parameter_and_the_totals():
    lines = str(describe(placed())).splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[0] == ["param", "shape", "dtype", "axes", "spec", "bytes per device", "total"]
    by_name = {line[0]: line[1:] for line in cells[1:]}
    names = "layer expert embed hidden"
    assert by_name["w_in"] == ["[2, 4, 6, 8]", "float32", names, "-, expert, -, tensor", "384", "1,536"]
    assert by_name["w_out"] == ["[8, 5]", "bfloat16", "tensor, -", "40", "80"]
    assert by_name["both"] == ["[8]", "float32", "data*tensor", "8", "32"]
    assert by_name["scale"] == ["[]", "float32", "whole", "4", "4"]
    assert cells[-1] == ["4 params", "433 numbers", "436", "1,652"]
    assert len({line.index("tensor") for line in lines if line.startswith("w_out")} | {lines[0].index("spec")}) == 1


def test_rich_draws_the_same_table_and_takes_no_name_for_markup():
    out = io.StringIO()
    Console(file=out, width=200).print(describe({"[red]": jnp.ones(3), "b": [jnp.ones((2, 2))]}))
    assert "[red]" in out.getvalue()
    assert "b.0" in out.getvalue()


def test_arrays_whose_place_no_mesh_describes_are_shown_by_their_pieces():
    fully = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    described = describe([jax.device_put(jnp.ones(4), fully), np.ones((2, 3))])
    assert [row.name for row in described.rows] == ["0", "1"]
    assert [row.layout for row in described.rows] == ["whole", "whole"]


def test_what_is_no_array_is_named():
    with pytest.raises(BadInput, match=r"optimizer\.rate is a float"):
        describe({"optimizer": {"rate": 0.1}})


def test_an_empty_tree_has_a_table_too():
    assert str(describe({})).splitlines()[-1].split() == ["0", "params", "0", "numbers", "0", "0"]


def test_a_drawing_shows_every_dimension_and_its_pieces():
    lines = describe(placed()).draw("w_in").splitlines()
    assert lines[0] == "w_in [2, 4, 6, 8] float32: 384 of 1,536 bytes a device"
    bars = [[int(n) for n in re.findall(r"\d+", line[line.index("|") : line.rindex("|")])] for line in lines[1:5]]
    assert bars == [[2], [2, 2], [6], [4, 4]]
    assert [line.split("|")[-1].strip() for line in lines[1:5]] == [
        "whole",
        "2 pieces of 2 along expert 2",
        "whole",
        "2 pieces of 4 along tensor 2",
    ]
    assert [line.split()[1] for line in lines[1:5]] == ["layer", "expert", "embed", "hidden"]
    assert lines[5].strip() == "each piece is on 2 devices, along data 2"
    assert len({line.index("|") for line in lines[1:5]}) == 1


def test_a_drawing_of_many_pieces_leaves_the_middle_out():
    mesh = jax.sharding.AbstractMesh((512,), ("expert",))
    many = jax.ShapeDtypeStruct((1024, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("expert")))
    lines = describe({"w": many}).draw("w").splitlines()
    assert "..." in lines[1]
    assert lines[1].endswith("512 pieces of 2 along expert 512")
    assert max(map(len, lines)) < 110


def test_a_drawing_works_for_any_rank_and_names_the_nearest():
    description = describe(placed())
    assert description.draw("scale").splitlines()[1:] == [
        "  each piece is on 8 devices, along data 2 x expert 2 x tensor 2"
    ]
    with pytest.raises(BadInput, match="no parameter 'w_inn'; did you mean 'w_in'"):
        description.draw("w_inn")


def test_the_page_prints_what_it_shows():
    page = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text().split("## Describe")[1]
    program, shown = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "text"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {"__name__": "page"})
    assert printed.getvalue() == shown
