"""The bench program without a GPU: counts, ratios, tables, and what it does when something cannot run."""

import json

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import bench
from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import BenchCase, Published, bench_cases
from dsv3_kernels.gpu.ceilings import Ceilings, measure_ceilings
from dsv3_kernels.gpu.report import as_data, markdown
from dsv3_kernels.gpu.timing import WALL_CLOCK, num_input_sets, seconds_per_launch, split_launches, usable_clock
from dsv3_kernels.gpu.torch_peer.problems import TorchGemm

CEILINGS = Ceilings(copy_bytes=2.5e12, bf16_flops=600e12, fp8_flops=1200e12)
MACHINE = {"device": "Some GPU", "jax": "1.2.3"}


def kernel(x):
    return x + 1


def peer(x):
    return x + 2


def refusing(x):
    raise NotImplementedError("no Hopper")


def failing(x):
    raise jax.errors.JaxRuntimeError("out of memory\nat length")


def case_of(**changes) -> BenchCase:
    case = BenchCase(
        "op", "m64", lambda key: jax.random.normal(key, (4,)), kernel, {"XLA bf16": peer},
        flops=1.2e9, num_bytes=25e6, published=Published("elsewhere", 100, 2000), torch=TorchGemm(64, 2112, 7168),
    )  # fmt: skip
    return case._replace(**changes)


def timer(function, sets):
    """Told seconds: the kernel takes 20 µs, the other way 30."""
    function(sets[0])
    median = {kernel: 20e-6, peer: 30e-6}[function]
    return median, median * 0.9, median * 1.1


def always() -> bool:
    return True


def test_ratios_rates_and_shares():
    (row,) = bench.run_cases([case_of()], timer, has_time=always)
    data = as_data(row, CEILINGS)
    assert data["times_faster"] == {"XLA bf16": 1.5}
    assert (data["kernel_us"], data["tflops"], data["gbps"]) == (20.0, 60.0, 1250.0)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("memory", 0.5)  # 25 MB need 10 µs, 1.2 GFLOP need 1
    assert data["kernel_us_range"] == [18.0, 22.0]
    data = as_data(bench.run_cases([case_of(flops=18e9)], timer, has_time=always)[0], CEILINGS)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("compute", 0.75)
    data = as_data(bench.run_cases([case_of(flops=9e9, is_bf16=True)], timer, has_time=always)[0], CEILINGS)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("compute", 0.75)


def test_what_cannot_run_leaves_a_note_and_the_other_times():
    refused, failed, late = bench.run_cases(
        [case_of(kernel=refusing), case_of(others={"XLA bf16": peer, "other": failing}), case_of()],
        timer,
        has_time=iter([True, True, False]).__next__,
    )
    assert (refused.kernel, refused.others) == (None, {"XLA bf16": 30e-6})
    assert refused.notes == ("kernel: no Hopper",)
    assert failed.others == {"XLA bf16": 30e-6, "other": None}
    assert failed.notes == ("other failed: out of memory",)
    assert (late.kernel, late.notes) == (None, ("no time left",))
    page = markdown(MACHINE, CEILINGS, [refused, failed, late])
    assert page.count("not measured") == 2
    assert "(30.0 µs)" in page
    assert as_data(refused, CEILINGS)["kernel_us"] is None


def test_the_page_has_a_table_an_op():
    rows = bench.run_cases([case_of(), case_of(op="other", published=None)], timer, has_time=always)
    page = markdown(MACHINE, CEILINGS, rows)
    assert "# Some GPU" in page
    assert "copy 2500 GB/s" in page
    assert "| m64 | 20.0 | 60 | 1250 | 50% m | 100 TFLOPS 2000 GB/s (elsewhere) | 1.50 |  |" in page
    assert "## op\n" in page
    assert "## other\n" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


def test_a_note_of_several_rows_is_written_once():
    (row,) = bench.run_cases([case_of()], timer, has_time=always)
    rows = [row._replace(notes=notes) for notes in (("rare", "torch flex: no"), (), ("torch flex: no",))]
    page = markdown(MACHINE, CEILINGS, rows)
    assert "| rare; (1) |" in page
    assert "| (1) |" in page
    assert page.count("torch flex: no") == 1
    assert page.endswith("|\n\n- (1) torch flex: no\n")


def test_torchs_fastest_way_is_named_beside_its_ratio():
    (row,) = bench.run_cases([case_of()], timer, has_time=always)
    others = {**row.others, "torch": 25e-6, "torch fast": None}
    row = row._replace(others=others, ways={"torch": {"flex": 50e-6, "sdpa cudnn": 25e-6}})
    assert row.ratios == {"XLA bf16": 1.5, "torch": 1.25}
    data = as_data(row, CEILINGS)
    assert data["other_us"] == {"XLA bf16": 30.0, "torch": 25.0, "torch fast": None}
    assert data["fastest_way"] == {"torch": "sdpa cudnn"}
    assert data["way_us"] == {"torch": {"flex": 50.0, "sdpa cudnn": 25.0}}
    json.dumps(data)
    page = markdown(MACHINE, CEILINGS, [row, row._replace(kernel=None)])
    assert "| 1.50 | 1.25 (sdpa cudnn) |  |" in page
    assert "| (30.0 µs) | (25.0 µs, sdpa cudnn) |  |" in page


def test_input_sets_outlast_the_cache():
    assert num_input_sets(15.8e6) * 15.8e6 > 4 * 50e6
    assert num_input_sets(1e9) == 2
    assert num_input_sets(100) == 32


def test_launches_of_several_kernels_are_summed():
    assert split_launches([1, 2, 3, 4, 5, 6], 3) == [3, 7, 11]
    assert split_launches([1, 2, 3], 2) == [3, 3]


def test_the_wall_clock_serves_anywhere():
    sets = [jnp.ones(8), jnp.zeros(8)]
    median, least, most = seconds_per_launch(kernel, sets, clock=WALL_CLOCK, samples=3)
    assert 0 < least <= median <= most
    ceilings = measure_ceilings(
        lambda function, sets: seconds_per_launch(function, sets, clock=WALL_CLOCK, samples=1)[0],
        copy_bytes=1 << 12, size=32,
    )  # fmt: skip
    assert all(rate > 0 for rate in ceilings)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert usable_clock()[0] == WALL_CLOCK
    for arguments in (["--quick"], ["mla_decode"], ["mla_prefill"]):
        assert bench.main(arguments) == 0
        assert "No GPU here" in capsys.readouterr().out
    assert bench.main(["fp9_gemm"]) == 2
    assert "['fp9_gemm'] have no cases; known are" in capsys.readouterr().err


def test_cases_hold_the_published_tables():
    cases = bench_cases()
    names = [(case.op, case.name) for case in cases]
    assert len(set(names)) == len(names)
    published = {op: [c for c in cases if c.op == op and c.published] for op in {case.op for case in cases}}
    assert len(published["fp8_gemm"]) == 18
    assert len(published["grouped_fp8_gemm"]) == 4
    assert len(published["grouped_fp8_gemm_masked"]) == 6
    for op in ("fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_gemm_masked"):
        for case in published[op]:
            seconds = case.flops / (case.published.tflops * 1e12)
            assert case.num_bytes / seconds / 1e9 == pytest.approx(case.published.gbps, rel=0.02), case.name


def test_file_names():
    assert machine.file_stem("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
