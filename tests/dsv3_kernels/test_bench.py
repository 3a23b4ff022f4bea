"""The bench program without a GPU: counts, ratios, tables, and what it does when something cannot run."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import bench, dispatch
from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import BenchCase, Published, bench_cases, check_cases, diff
from dsv3_kernels.gpu.ceilings import Ceilings, measure_ceilings
from dsv3_kernels.gpu.isolate import Lost
from dsv3_kernels.gpu.measuring import as_answer, from_answer, measured
from dsv3_kernels.gpu.report import as_data, goal_seconds, markdown
from dsv3_kernels.gpu.timing import (
    WALL_CLOCK,
    Times,
    num_input_sets,
    seconds_per_launch,
    split_launches,
    summed,
    usable_clock,
)
from dsv3_kernels.gpu.torch_peer.problems import TorchGemm
from dsv3_kernels.prefill_attention import bench as prefill_bench
from dsv3_kernels.prefill_attention.cases import Case

CEILINGS = Ceilings(copy_bytes=2.5e12, bf16_flops=600e12, fp8_flops=1200e12)
MACHINE = {"device": "Some GPU", "jax": "1.2.3"}


def kernel(x):
    return x + 1


def peer(x):
    return x + 2


def refusing(x):
    raise NotImplementedError("no Hopper")


def puzzled(x):
    raise TypeError("no such layout")


def failing(x):
    raise jax.errors.JaxRuntimeError("out of memory\nat length")


def case_of(**changes) -> BenchCase:
    case = BenchCase(
        "op", "m64", lambda key: jax.random.normal(key, (4,)), kernel, {"XLA bf16": peer},
        flops=1.2e9, num_bytes=25e6, published=Published("elsewhere", 100, 2000), torch=TorchGemm(64, 2112, 7168),
    )  # fmt: skip
    return case._replace(**changes)


def timer(function, sets):
    """Given seconds: the kernel takes 20 µs, the other way 30."""
    function(sets[0])
    median = {kernel: 20e-6, peer: 30e-6}[function]
    return Times(median, median * 0.9, median * 1.1, (median * 0.2, median * 0.8))


def test_ratios_rates_and_shares():
    row = measured(case_of(), timer)
    data = as_data(row, CEILINGS)
    assert data["times_faster"] == {"XLA bf16": 1.5}
    assert (data["kernel_us"], data["tflops"], data["gbps"]) == (20.0, 60.0, 1250.0)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("memory", 0.5)  # 25 MB need 10 µs, 1.2 GFLOP need 1
    assert data["kernel_us_range"] == [18.0, 22.0]
    assert data["kernels_us"] == [4.0, 16.0]
    data = as_data(measured(case_of(flops=18e9), timer), CEILINGS)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("compute", 0.75)
    data = as_data(measured(case_of(flops=9e9, is_bf16=True), timer), CEILINGS)
    assert (data["ceiling"], data["share_of_ceiling"]) == ("compute", 0.75)


def test_what_cannot_run_leaves_a_note_and_the_other_times():
    refused = measured(case_of(kernel=refusing), timer)
    failed = measured(case_of(others={"XLA bf16": peer, "other": failing, "odd": puzzled}), timer)
    late = bench.unmeasured(case_of())
    assert (refused.kernel, refused.others) == (None, {"XLA bf16": 30e-6})
    assert refused.notes == ("kernel: no Hopper",)
    assert failed.others == {"XLA bf16": 30e-6, "other": None, "odd": None}
    assert failed.notes == ("other failed: out of memory", "odd failed: no such layout")
    assert (late.kernel, late.notes) == (None, ("not reached",))
    page = markdown(MACHINE, CEILINGS, [refused, failed, late])
    assert page.count("not measured") == 2
    assert "(30.0 µs)" in page
    assert as_data(refused, CEILINGS)["kernel_us"] is None


def test_the_page_has_a_table_an_op():
    rows = [measured(case, timer) for case in (case_of(), case_of(op="other", published=None))]
    page = markdown(MACHINE, CEILINGS, rows)
    assert "# Some GPU" in page
    assert "copy 2500 GB/s" in page
    cells = "| m64 | 20.0 | 16.0 of 2 | 13.0 | 65% | 60 | 1250 | 50% m | 100 TFLOPS 2000 GB/s (elsewhere) | 1.50 |  |"
    assert cells in page
    assert "## op\n" in page
    assert "## other\n" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


def test_a_note_of_several_rows_is_written_once():
    row = measured(case_of(), timer)
    rows = [row._replace(notes=notes) for notes in (("rare", "torch flex: no"), (), ("torch flex: no",))]
    page = markdown(MACHINE, CEILINGS, rows)
    assert "| rare; (1) |" in page
    assert "| (1) |" in page
    assert page.count("torch flex: no") == 1
    assert page.endswith("|\n\n- (1) torch flex: no\n")


def test_torchs_fastest_way_is_named_beside_its_ratio():
    row = measured(case_of(), timer)
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


def test_launches_of_several_kernels_are_summed_and_told_apart():
    assert split_launches([1, 2, 3, 4, 5, 6], 3) == [(1, 2), (3, 4), (5, 6)]
    assert split_launches([1, 2, 3], 2) == [(3,), (3,)]
    assert summed([(1, 2), (3, 4), (5, 7)]) == Times(7, 3, 12, (3, 4))
    assert summed([(1, 2), (3,)]) == Times(3, 3, 3, ())


def test_the_goal_of_what_memory_binds_is_its_bytes_at_the_copy_rate_and_3_microseconds():
    """DeepGEMM's published times at M = 64 and 128 are about that, if its H800 copies 2.9 TB/s."""
    assert goal_seconds(case_of(), CEILINGS) == pytest.approx(25e6 / 2.5e12 + 3e-6)
    assert goal_seconds(case_of(num_launches=3), CEILINGS) == pytest.approx(25e6 / 2.5e12 + 9e-6)
    row = measured(case_of(), timer)
    assert as_data(row, CEILINGS)["goal_us"] == 13.0
    assert as_data(row, CEILINGS)["share_of_goal"] == 0.65
    assert as_data(row._replace(kernel=None), CEILINGS)["goal_us"] == 13.0
    ceilings = CEILINGS._replace(copy_bytes=2.9e12)
    for case in bench_cases(["fp8_gemm"]):
        if case.published and case.published.tflops and case.name.startswith(("m64_", "m128_")):
            seconds = case.flops / (case.published.tflops * 1e12)
            assert 0.75 < goal_seconds(case, ceilings) / seconds < 1.35, case.name


def test_the_goal_of_what_products_bind_is_a_share_of_their_rate_or_what_was_published():
    case = case_of(flops=18e9)  # 15 µs at the rate of FP8
    assert goal_seconds(case._replace(published=None), CEILINGS) == pytest.approx(15e-6)
    assert goal_seconds(case, CEILINGS) == pytest.approx(180e-6)
    assert goal_seconds(case._replace(goal_share=0.75), CEILINGS) == pytest.approx(20e-6)
    assert goal_seconds(case._replace(goal_share=0.75, is_bf16=True), CEILINGS) == pytest.approx(40e-6)


def test_a_row_survives_the_way_from_its_process():
    for row in (measured(case_of(), timer), measured(case_of(kernel=refusing), timer)):
        assert from_answer(row.case, json.loads(json.dumps(as_answer(row)))) == row


def test_rows_take_turns_those_with_published_figures_first():
    cases = bench_cases()
    ops = {case.op for case in cases}
    assert ops == {case.op for case in check_cases()} - {"quantize_tiles"}
    assert {case.op for case in cases[: len(ops)]} == ops
    for op in ops:
        is_published = [case.published is not None for case in cases if case.op == op]
        assert is_published == sorted(is_published, reverse=True)
    asked = list(bench.asked_for([*map(bench.unmeasured, cases)], iter([True, True, False]).__next__))
    assert asked == [{"ceilings": True}, *({"op": case.op, "name": case.name} for case in cases[:2])]


def test_every_row_is_saved_as_it_is_measured(capsys, monkeypatch, tmp_path):
    """What is cut short leaves a page and data of all rows, and of a process that was lost the reason; a next run goes
    on after it.
    """
    cases = bench_cases()
    about = {"device": "Some GPU", "jax": "1.2.3", "clock": WALL_CLOCK, "tokamax": "not installed", "obstacle": ""}
    first = as_answer(measured(case_of(), timer))
    asked = []

    def said(command, requests, *, limit):
        yield dict(about)
        assert next(requests) == {"ceilings": True}
        yield CEILINGS._asdict()
        for answer, request in zip((first, Lost(True, "no answer in 90 s", "")), requests):
            asked.append((request["op"], request["name"]))
            yield answer
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "answers", said)
    monkeypatch.setattr(machine, "results_folder", lambda: tmp_path / "results")
    with pytest.raises(KeyboardInterrupt):
        bench.main([])
    data = json.loads((tmp_path / "results" / "some_gpu.json").read_text())
    assert len(data["rows"]) == len(cases)
    assert [row["kernel_us"] for row in data["rows"][:3]] == [20.0, None, None]
    assert data["rows"][1]["notes"] == ["lost: no answer in 90 s"]
    page = (tmp_path / "results" / "some_gpu.md").read_text()
    assert "- tokamax: not installed" in page
    assert page.count("not reached") >= len({case.op for case in cases}) - 2
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"1/{len(cases)}, ")
    assert "20.0 µs" in told[0]
    assert "lost: no answer" in told[1]
    names = [(case.op, case.name) for case in cases]
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--resume"])
    assert asked == [*names[:2], *names[1:3]]
    data = json.loads((tmp_path / "results" / "some_gpu.json").read_text())
    assert [row["kernel_us"] for row in data["rows"][:3]] == [20.0, 20.0, None]
    about["jax"] = "another"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--resume"])
    assert asked[4:] == names[:2]


def test_rows_of_what_a_first_run_wants_to_know():
    rows = {(case.op, case.name): case for case in bench_cases()}
    names = {op: [name for its, name in rows if its == op] for op, _ in rows}
    for op in ("fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_gemm_masked"):
        for ending in ("on 132 SMs", "on 108 SMs", "as called, from bf16"):
            found = [name for name in names[op] if name.endswith(ending)]
            assert found, (op, ending)
            assert all(name.removesuffix(f" {ending}") in names[op] for name in found)
    called = rows["fp8_gemm", "m64_n2112_k7168 as called, from bf16"]
    assert called.num_bytes == 2 * 64 * 7168 + 2112 * 7168 + 2 * 64 * 2112
    fp8 = [name for name in names["mla_decode"] if name.endswith("-fp8")]
    assert {name.split("-")[2] for name in fp8} == {"h16", "h128"}
    for name in fp8:
        assert "BF16 cache" in rows["mla_decode", name].others
        assert name.removesuffix("-fp8") in names["mla_decode"]


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason="jax older than the kernels need")
def test_rows_on_fewer_multiprocessors_have_smaller_grids():
    """Lowered for CUDA, which needs no GPU."""
    cases = {case.name: case for case in bench_cases(["fp8_gemm"])}
    texts = set()
    for num_sms in (132, 108):
        case = cases[f"m4096_n7168_k2048 on {num_sms} SMs"]
        shapes = jax.eval_shape(case.make_inputs, jax.random.key(0))
        texts.add(jax.jit(case.kernel).trace(shapes).lower(lowering_platforms=("cuda",)).as_text())
    assert len(texts) == 2


@pytest.mark.slow
def test_every_way_of_every_row_can_be_traced():
    for case in bench_cases():
        shapes = jax.eval_shape(case.make_inputs, jax.random.key(0))
        for way in (case.kernel, *case.others.values()):
            jax.eval_shape(way, shapes)


@pytest.mark.slow
def test_tokamax_stands_beside_torch_where_it_is_installed(monkeypatch, tmp_path):
    assert not any("tokamax" in case.others for case in bench_cases(["mla_prefill"]))
    package = tmp_path / "tokamax"
    package.mkdir()
    (package / "__init__.py").write_text(
        """
import jax

def dot_product_attention(query, key, value, *, mask, is_causal, scale, implementation):
    assert implementation == "mosaic"
    query, key, value = (x.astype("float32") for x in (query, key, value))
    mask = mask if mask is None else mask.repeat(query.shape[2], 1)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
""",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    cases = bench_cases(["mla_prefill"])
    assert ["tokamax" in case.others for case in cases] == [case.name.endswith("forward") for case in cases]
    for case in (Case("", 1, 20, 20, 1, 0, 8, 8), Case("", 1, 8, 20, 1, 3, 8, 8)):
        inputs = prefill_bench.make_inputs(case, jax.random.key(0))
        expected, _ = prefill_bench._forward(case, inputs, "xla")
        assert float(diff(prefill_bench._tokamax(case, inputs), expected)) < 1e-4
    monkeypatch.delitem(sys.modules, "tokamax")


def test_the_wall_clock_serves_anywhere():
    sets = [jnp.ones(8), jnp.zeros(8)]
    median, least, most, _ = seconds_per_launch(kernel, sets, clock=WALL_CLOCK, samples=3)
    assert 0 < least <= median <= most
    ceilings = measure_ceilings(
        lambda function, sets: seconds_per_launch(function, sets, clock=WALL_CLOCK, samples=1)[0],
        copy_bytes=1 << 12, size=32,
    )  # fmt: skip
    assert all(rate > 0 for rate in ceilings)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_without_a_gpu(capsys):
    assert usable_clock()[0] == WALL_CLOCK
    assert bench.main(["mla_decode", "--quick"]) == 0
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
