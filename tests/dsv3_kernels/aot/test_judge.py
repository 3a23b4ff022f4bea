"""What is good, what is not, and the table that shows it."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels.aot import hlo, judge, report
from dsv3_kernels.aot.case import FP8_MMA, AotCase

SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function 'body'"
)
CASE = AotCase("op 1", jnp.sin, (jax.ShapeDtypeStruct((1,), jnp.float32),), (FP8_MMA, r"div\.rn"), (r"div\.approx",))
DUMP = {
    "body_0.ptxas": "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 90 registers, 1 bytes smem",
    "body_0.ptx": "div.rn.f32 %f1, %f2, %f3;",
    "body_0.mlir-passes.log": """
    %size = arith.constant 1024 : i32 loc(#loc)
    %launch = gpu.launch async [%token] blocks(%a) in (%b = %c) dynamic_shared_memory_size %size {
""",
    "body_0.sass_ctrl": """
.L_x_0:
        /*0000*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24
        /*0010*/                   LDS R9, [R38+0x20]
        /*0020*/              @P2 BRA `(.L_x_0)
        /*0030*/                   EXIT
""",
}


def faults(dump: dict[str, str], case: AotCase = CASE) -> list[str]:
    return judge.find_faults(case, judge.read_cost(case, dump), dump)


def test_a_good_kernel_has_no_fault():
    cost = judge.read_cost(CASE, DUMP)
    assert cost == judge.Cost(90, 0, 1024, Counter(QGMMA=1, LDS=1, BRA=1), Counter(QGMMA=1, LDS=1, BRA=1, EXIT=1))
    assert faults(DUMP) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("body_0.ptxas", "0 bytes spill loads", "8 bytes spill loads", "spills 8 bytes"),
        ("body_0.mlir-passes.log", "constant 1024", "constant 232449", "232449 B of shared memory, over 232448"),
        ("body_0.sass_ctrl", "QGMMA.64x128x32.F32.E4M3.E4M3", "HGMMA.64x128x16.F32", "has no QGMMA"),
        ("body_0.ptx", "div.rn.f32", "div.approx.f32", "has div.approx"),
        ("body_0.ptxas", "Used", f"{SERIALIZED}\nUsed", "wgmma.mma_async instructions are serialized due to insuff"),
        (
            "body_0.sass_ctrl",
            "LDS R9",
            "USETMAXREG.DEALLOC.CTAPOOL 0x8\n        /*0011*/                   LDS R9",
            "touches R87 after setmaxnreg 8",
        ),
    ],
)
def test_each_fault_is_found(file, old, new, fault):
    assert any(fault in found for found in faults(DUMP | {file: DUMP[file].replace(old, new)}))


def test_limit_of_shared_memory_is_the_case_s():
    assert faults(DUMP, CASE._replace(max_shared_bytes=1000)) == [
        "takes 1024 B of shared memory, over 1000; take fewer stages"
    ]


def test_a_case_judges_the_whole_program():
    dump = DUMP | {hlo.FILE: "HloModule jit_op"}
    assert faults(dump, CASE._replace(expect=lambda hlo: [f"is {hlo}"])) == ["is HloModule jit_op"]


def test_several_kernels_of_a_case_are_judged_together():
    more = {
        "body_1.ptxas": DUMP["body_0.ptxas"]
        .replace("90", "120")
        .replace("0 bytes spill stores", "4 bytes spill stores"),
        "body_1.mlir-passes.log": DUMP["body_0.mlir-passes.log"].replace("1024", "512"),
        "body_1.sass_ctrl": "        /*0000*/                   EXIT",
    }
    cost = judge.read_cost(CASE, DUMP | more)
    assert (cost.registers, cost.spill_bytes, cost.shared_bytes, cost.loop) == (
        120,
        4,
        1024,
        Counter(QGMMA=1, LDS=1, BRA=1),
    )


def test_a_missing_report_is_no_success():
    with pytest.raises(ValueError, match="no Mosaic kernel"):
        judge.read_cost(CASE, {})
    with pytest.raises(ValueError, match="no SASS"):
        judge.read_cost(CASE, DUMP | {"body_0.sass_ctrl": ""})
    copying = DUMP["body_0.sass_ctrl"].replace("LDS R9, [R38+0x20]", "UTMALDG.2D [UR8], [UR4]")
    with pytest.raises(ValueError, match="no descriptor was found"):
        faults(DUMP | {"body_0.sass_ctrl": copying})


def test_table_is_inserted_between_its_marks():
    cost = judge.read_cost(CASE, DUMP)
    first = report.table([("op 1", cost)])
    assert "| op 1 | 90 | 0 | 1024 | 3 | 1 |" in first
    readme = report.insert("# Kernels\n\nWords.\n", first)
    assert readme.startswith("# Kernels\n\nWords.\n\n" + report.BEGIN)
    second = report.table([("op 1", cost), ("op 2", cost._replace(loop=None))])
    again = report.insert(readme + "\nMore words.\n", second)
    assert again.count(report.BEGIN) == again.count(report.END) == 1
    assert again.endswith("\nMore words.\n")
    assert second in again


def test_readme_must_have_the_same_cases_but_not_the_same_numbers():
    cost = judge.read_cost(CASE, DUMP)
    table = report.table([("op 1", cost), ("op 2", cost)])
    readme = report.insert("", table)
    assert report.differences(readme, table) == []
    assert report.differences(readme, report.table([("op 1", cost._replace(registers=91)), ("op 2", cost)])) == []
    assert report.differences(readme, report.table([("op 1", cost), ("op 3", cost)])) == [
        "its table lacks op 3",
        "its table has op 2, which is no case",
    ]
    assert report.differences(readme.replace("| registers", "| regs"), table) == ["its table has other columns"]
    assert report.differences("# Kernels", table) == ["it has no table of compiled kernels"]
