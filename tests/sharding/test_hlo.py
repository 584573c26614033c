"""Reading optimised HLO: recorded from jax 0.10 and 0.12 on CPU and for TPU v5p, and GPU notation by hand."""

from pathlib import Path

import pytest

from gshardx.sharding.hlo import Shape, parse

RECORDED = Path(__file__).parent / "hlo"
"""jit of a scan of three layers, each with an exchange, a product and an exchange back, on a mesh of fsdp 2 x expert 4;
GPU: as XLA's printer writes it, by hand."""
SCANS = ["cpu_jax_0.10", "cpu_jax_0.12", "tpu_v5p_jax_0.10", "tpu_v5p_jax_0.12"]


def recorded(name):
    return parse((RECORDED / f"{name}.txt").read_text())


def one(line):
    """The only instruction of a program that is ``line``."""
    (instruction,) = parse(f"ENTRY %main () -> f32[] {{\n  {line}\n}}").computations["main"].values()
    return instruction


def times(program, op):
    return sorted(executed.times for executed in program.executed() if executed.instruction.op == op)


@pytest.mark.parametrize(
    ("written", "shapes", "size"),
    [
        ("f32[]", [("f32", ())], 4),
        ("bf16[8,16]{1,0}", [("bf16", (8, 16))], 256),
        ("f32[2,64]{1,0:T(8,128)}", [("f32", (2, 64))], 512),
        ("bf16[4,2,1,8,128]{4,3,1,2,0:T(8,128)(2,1)S(1)}", [("bf16", (4, 2, 1, 8, 128), 1)], 16384),
        ("pred[3]{0}", [("pred", (3,))], 3),
        ("s4[3]{0:E(4)}", [("s4", (3,))], 2),
        ("f8e4m3fn[5]{0}", [("f8e4m3fn", (5,))], 5),
        ("c64[2]{0}", [("c64", (2,))], 16),
        ("s32[<=8,2]{1,0}", [("s32", (8, 2))], 64),
        ("token[]", [("token", ())], 0),
        ("()", [], 0),
        (
            "(f32[2]{0:T(128)}, (u32[]{:S(2)}, /*index=5*/bf16[4]{0}))",
            [("f32", (2,)), ("u32", (), 2), ("bf16", (4,))],
            20,
        ),
    ],
)
def test_shapes(written, shapes, size):
    instruction = one(f'%it.1 = {written} custom-call(%a.1, f32[2]{{0}} %b-2), custom_call_target="(odd)", x={{1}}')
    assert instruction.shapes == tuple(Shape(*shape) for shape in shapes)
    assert instruction.bytes == size
    assert (instruction.name, instruction.op, instruction.operands) == ("it.1", "custom-call", ("a.1", "b-2"))
    assert instruction.find(r"x=\{(\d)\}") == "1"


def test_constants_keep_their_literal_and_roots_are_marked():
    constant = one("ROOT %c = s32[] constant(7)")
    assert (constant.literal, constant.root) == ("7", True)
    assert not one("%c = s32[2]{0} constant({1, 2})").root


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_runs_its_body_as_often_as_it_turns(name):
    program = recorded(name)
    assert times(program, "all-to-all") == [3, 3]
    assert times(program, "all-gather") == [3]
    assert times(program, "all-reduce") == [1]
    assert program.instructions > 50


def test_known_trip_counts_agree_with_those_of_the_condition():
    text = (RECORDED / "cpu_jax_0.12.txt").read_text()
    assert '"known_trip_count":{"n":"3"}' in text
    assert times(parse(text.replace("known_trip_count", "unknown")), "all-to-all") == [3, 3]
    assert times(parse(text.replace('"n":"3"', '"n":"0"')), "all-to-all") == [0, 0]


def test_a_loop_of_unknown_length_counts_as_one_pass():
    text = (RECORDED / "tpu_v5p_jax_0.12.txt").read_text()
    assert times(parse(text.replace("constant(3)", "parameter(3)")), "all-to-all") == [1, 1]


def test_gpu_notation():
    program = recorded("gpu")
    assert times(program, "all-reduce-start") == [10]  # 2 outer times 5 inner passes, inside a call
    for op in ("all-gather-start", "all-to-all-start", "reduce-scatter-start", "ragged-all-to-all"):
        assert times(program, op) == [1]
    assert times(program, "collective-permute") == [1]  # a branch counts as taken
    assert times(program, "dot") == []  # it is inside a fusion
    fusion = program.computations["main"]["gemm"]
    assert [inner.op for inner in program.fused(fusion).values()] == ["parameter", "parameter", "dot"]


@pytest.mark.parametrize("name", SCANS)
def test_sources_come_from_the_tables_of_stack_frames(name):
    program = recorded(name)
    dots = [one for computation in program.computations.values() for one in computation.values()
            if one.op in ("dot", "convolution")]  # fmt: skip
    assert [program.source(dot) for dot in dots] == ["project/layers/exchange.py:17"]
    assert "while/body" in dots[0].op_name
    assert dots[0].op_name.endswith("egm,emh->egh/dot_general")


def test_annotations_are_not_where_a_constraint_came_from():
    tables = """
FileNames
1 "/a/project/layers/moe.py"
2 "/a/gshardx/sharding/annotate.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=30 end_line=30 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=95 end_line=95 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}
4 {file_location_id=2 parent_frame_id=1}
"""
    program = parse(f"HloModule m\n{tables}\nENTRY %main () -> f32[] {{\n}}")
    assert program.sources[3] == ("gshardx/sharding/annotate.py:95",) * 2 + ("project/layers/moe.py:30",)

    def source(frame):
        return program.source(one(f'%c = f32[] constant(0), metadata={{op_name="x" stack_frame_id={frame}}}'))

    assert [source(frame) for frame in (1, 3)] == ["project/layers/moe.py:30"] * 2
    assert source(4) == "gshardx/sharding/annotate.py:95"  # nothing else is known
    assert source(99) == ""


def test_older_metadata_names_the_source_itself():
    program = recorded("gpu")
    assert program.source(program.computations["inner_body"]["all-reduce-start"]) == "project/layers/norm.py:21"
    assert program.source(program.computations["main"]["gemm"]) == ""


def test_unbalanced_text_is_an_error():
    with pytest.raises(ValueError, match="unbalanced"):
        one("%a = f32[] add(%b")
