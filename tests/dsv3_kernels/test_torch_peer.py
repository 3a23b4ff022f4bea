"""torch's times beside ours: question and answers without torch; what torch computes, where it is installed."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsv3_kernels.gpu import torch_ask
from dsv3_kernels.gpu.case import BenchCase
from dsv3_kernels.gpu.report import Row
from dsv3_kernels.gpu.timing import num_input_sets
from dsv3_kernels.gpu.torch_ask import run_peer, with_torch
from dsv3_kernels.gpu.torch_peer import __main__ as program
from dsv3_kernels.gpu.torch_peer import clock, decode, prefill
from dsv3_kernels.gpu.torch_peer.problems import TorchDecode, TorchGemm, TorchPrefill, from_json, to_json
from dsv3_kernels.gpu.torch_peer.way import Prepared, Way
from dsv3_kernels.prefill_attention.reference import attend

GEMM = TorchGemm(64, 2112, 7168)
DECODE = TorchDecode(2, 3, (300, 64, 7, 450, 800, 3, 100, 210, 333), 48, 16, 64**-0.5)
PREFILL = TorchPrefill(2, 70, 70, 2, 24, 16, 0, 24**-0.5, False)


def row_of(problem, *, num_bytes: float = 25e6, others=None) -> Row:
    case = BenchCase("op", "m", lambda key: key, lambda x: x, {}, flops=1.0, num_bytes=num_bytes, torch=problem)
    return Row(case, 20e-6, {"XLA": 30e-6} if others is None else others, ("a note",))


# The question and the answers: no torch.


@pytest.mark.parametrize("problem", [GEMM, DECODE, PREFILL])
def test_a_problem_survives_json(problem):
    assert from_json(json.loads(json.dumps(to_json(problem)))) == problem


def test_the_fastest_way_stands_beside_the_others_and_refusals_are_noted():
    rows = [row_of(None), row_of(DECODE), row_of(GEMM, others={}), row_of(GEMM)]
    asked = []

    def ask(request):
        asked.append(request)
        return [
            {"version": "9.9"},
            {"row": 0, "column": "torch", "way": "bmm", "seconds": 50e-6},
            {"row": 0, "column": "torch", "way": "sdpa flash", "refused": "too wide"},
            {"row": 0, "column": "torch", "way": "sdpa cudnn", "refused": "too wide"},
            {"row": 1, "column": "torch", "way": "scaled_mm", "seconds": 25e-6},
            {"row": 1, "column": "torch fast", "way": "scaled_mm, fast", "refused": "no such GPU"},
            {"row": 0, "column": "torch", "way": "flex", "seconds": 40e-6},
        ]

    result, about = with_torch(rows, ask, "clock")
    sets = num_input_sets(25e6)
    assert asked == [{"clock": "clock", "rows": [{**to_json(problem), "sets": sets} for problem in (DECODE, GEMM)]}]
    assert about == "9.9"
    assert [result[0], result[2]] == [rows[0], rows[2]]
    assert result[1].ratios == {"XLA": 1.5, "torch": 2.0}
    assert result[1].fastest == {"torch": "flex"}
    assert result[1].notes == ("a note", "torch sdpa flash, sdpa cudnn: too wide")
    assert result[3].others == {"XLA": 30e-6, "torch": 25e-6, "torch fast": None}
    assert with_torch(rows, lambda request: [{"missing": "torch not installed"}], "") == (rows, "torch not installed")
    assert with_torch(rows[:1], ask, "")[1] == "no row that it computes"


def test_what_was_said_survives_the_end_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_ask, "GRACE", 1)
    python = tmp_path / "python"

    def answers(ending: str) -> list:
        lines = ["#!/bin/sh", "cat > /dev/null", """echo '{"version": "9.9"}'""", "echo a warning"]
        lines += ["""echo '{"row": 0}'""", """printf '{"row": 1, "wa'""", ending, ""]
        python.write_text("\n".join(lines), encoding="utf-8")
        python.chmod(0o755)
        return run_peer(str(python), {"rows": []}, 0)

    said = [{"version": "9.9"}, {"row": 0}]
    assert answers("exit 0") == said
    assert answers("echo whatever >&2; echo CUDA error >&2; exit 1") == [
        *said,
        {"missing": "torch's process failed (CUDA error)"},
    ]
    assert answers("exec sleep 60") == [*said, {"missing": "stopped after 1 s"}]
    assert run_peer(str(tmp_path / "nothing"), {}, 0) == [{"missing": "torch was not measured (FileNotFoundError)"}]


def test_the_program_runs_without_jax_and_says_that_there_is_no_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(jax=None, torch=None, numpy=None)\n", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), str(torch_ask.machine.PACKAGE.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_kernels.gpu.torch_peer"],
        input='{"clock": "", "seconds": 1, "rows": []}',
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"missing": "torch not installed"}


def test_compiled_ways_come_last_and_lose_nothing_else_when_time_is_up():
    def way(name: str, is_compiled: bool) -> Way:
        return Way("torch", name, lambda sets: Prepared([], lambda result: 0.0), 1.0, is_compiled)

    ways = [way("flex", True), way("bmm", False)]
    time_left = iter([True, True, True, False])
    said = list(
        program.answers([ways, ways], lambda index, way: {"seconds": 1.0}, has_time=lambda: next(time_left))
    )  # fmt: skip
    assert [(each["row"], each["way"], each.get("seconds"), each.get("refused")) for each in said] == [
        (0, "bmm", 1.0, None),
        (1, "bmm", 1.0, None),
        (0, "flex", 1.0, None),
        (1, "flex", None, "no time left"),
    ]


def test_reasons_are_one_short_line():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at x.cpp:1.)",
        "Flash attention requires one width. (Triggered internally at x.cpp:2.)",
        "CuDNN attention has been runtime disabled. (Triggered internally at x.cpp:3.)",
    ]
    assert (
        program.reason(RuntimeError("No available kernel. Aborting"), warned) == "Flash attention requires one width."
    )
    assert program.reason(RuntimeError("No available kernel"), []) == "No available kernel"
    assert program.reason(ValueError(), warned) == "ValueError"
    assert len(program.reason(ValueError("x" * 500 + "\ny"), [])) == program.LONGEST_REASON


def test_only_kernels_are_on_the_clock():
    def event(device: str, microseconds: float, is_user_annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            device_type=device, self_device_time_total=microseconds, is_user_annotation=is_user_annotation
        )

    events = [event("cuda", 3.0), event("cpu", 7.0), event("cuda", 9.0, True), event("cuda", 2.0)]
    assert clock.kernel_seconds(events, "cuda") == pytest.approx(5e-6)
    with pytest.raises(RuntimeError, match="no kernels"):
        clock.kernel_seconds(events[1:3], "cuda")


def test_groups_hold_all_sequences_and_little_padding(rng):
    lengths = tuple(np.maximum(rng.normal(4096, 2048, 128), 2).astype(int).tolist())
    groups = decode.group_lengths(lengths, decode.GROUPS)
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    padded = sum(len(group) * max(group) for group in groups)
    assert sum(lengths) <= padded < 1.35 * sum(lengths) < max(lengths) * 128
    assert decode.group_lengths((7,) * 5, 8) == [(7,) * 5]
    assert [len(group) for group in decode.group_lengths((3, 1, 2), 8)] == [1, 1, 1]


# What torch computes: where it is installed.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def seconds_of_each_way(torch, problem, monkeypatch) -> dict[str, dict]:
    monkeypatch.setattr(program, "seconds_per_launch", lambda torch, launches, clock: float(len(launches)))
    ways = program.ways(torch, {**to_json(problem), "sets": 2}, "cpu")
    return {way.name: program.measured(torch, way, 2, "") for way in ways}


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(640,) * 3, (70,) * 3, DECODE.lengths])
def test_decoding_ways_agree_with_float32(torch, monkeypatch, num_queries, lengths):
    problem = DECODE._replace(num_queries=num_queries, lengths=lengths)
    found = seconds_of_each_way(torch, problem, monkeypatch)
    for name in ("bmm", "sdpa math", "flex"):
        assert found[name] == {"seconds": 2.0}, name
    for name in ("sdpa flash", "sdpa cudnn", "sdpa efficient"):
        assert "refused" in found[name], name


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize("T", [33, 70])
@pytest.mark.parametrize("is_backward", [False, True])
def test_prefill_ways_agree_with_float32(torch, monkeypatch, documents, T, is_backward):
    problem = PREFILL._replace(T=T, num_documents=documents, is_backward=is_backward)
    found = seconds_of_each_way(torch, problem, monkeypatch)
    assert found["sdpa math"] == {"seconds": 2.0}
    assert ("sdpa flash" in found) == (not documents)
    assert ("varlen flash" in found) == (documents > 0 and T == 70)
    if not documents:
        assert found["sdpa flash"] == {"seconds": 2.0}
    assert ("refused" in found["flex"]) == is_backward  # none on a CPU


def test_a_wrong_mask_is_refused(torch, monkeypatch):
    """Decoding: one key too few, one too many, padding seen; prefill: causal from the top left, documents ignored."""
    for lengths in ((640,) * 3, DECODE.lengths):
        problem = DECODE._replace(lengths=lengths, num_queries=1)
        (groups,) = [decode._inputs(torch, problem, "cpu", 1)]
        (group,) = groups
        for shift in (-1, 1, 64):
            seen = torch.arange(group.k.shape[1]) < torch.tensor(group.lengths)[:, None, None] + shift
            wrong = torch.stack([decode._plain(torch, problem, *each) for each in zip(group.q, group.k, seen)])
            is_same = bool((seen == group.is_visible).all())
            assert (decode._error(torch, problem, groups, [wrong]) > 3 * decode.LIMIT) != is_same
    for problem, wrong in (
        (
            PREFILL._replace(T=33),
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        (PREFILL._replace(num_documents=4), prefill._sdpa("math")(torch, PREFILL, None, "cpu")),
    ):
        for is_backward in (False, True):
            prepared = prefill._prepared(
                torch, problem._replace(is_backward=is_backward), "cpu", 1, lambda *_, wrong=wrong: wrong, False
            )
            assert prepared.error(prepared.launches[0]()) > 3 * prefill.LIMIT


def test_torchs_float32_is_ours(torch):
    """What torch's ways are compared with is the definition of the kernel they stand beside."""
    problem = PREFILL._replace(T=33, num_documents=3)
    inputs = prefill._inputs(torch, problem, "cpu", prefill._document_ids(torch, problem, "cpu"))
    q, k, v = (jax.numpy.asarray(x.float().transpose(1, 2).numpy()) for x in inputs[:3])
    ids = jax.numpy.asarray(inputs.ids.int().numpy())
    out, _ = attend(q, k, v, ids[:, 37:], ids, None, softmax_scale=problem.softmax_scale)
    found = torch.from_numpy(np.asarray(out).copy()).transpose(1, 2)
    assert prefill._error(torch, problem, inputs, (found,)) < 1e-5


def test_documents_start_where_ids_change(torch):
    ids = torch.tensor([[1, 1, 2, 2, 2], [2, 3, 3, 3, 4]])
    assert prefill.document_starts(torch, ids).tolist() == [0, 2, 5, 6, 9, 10]


def test_the_fp8_product_agrees_with_float32(torch, monkeypatch):
    found = seconds_of_each_way(torch, TorchGemm(64, 128, 256), monkeypatch)
    assert found == {"scaled_mm": {"seconds": 2.0}, "scaled_mm, fast": {"seconds": 2.0}}


def test_a_wrong_or_failing_way_is_refused(torch):
    def way(prepare) -> Way:
        return Way("torch", "x", prepare, 0.5)

    def fails(sets: int):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    wrong = way(lambda sets: Prepared([lambda: None], lambda result: math.nan))
    assert program.measured(torch, wrong, 1, "") == {"refused": "differs by nan from float32"}
    assert program.measured(torch, way(fails), 1, "") == {"refused": "out of memory"}
