"""The check program: it passes what is right, fails what is wrong, and reports where it cannot run."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import check
from dsv3_kernels.gpu import checking
from dsv3_kernels.gpu.case import PATHS, CheckCase, Comparison, check_cases, diff, fp8_comparisons, in_turns, worst
from dsv3_kernels.gpu.checking import from_data
from dsv3_kernels.gpu.isolate import Lost, StartError, answers
from dsv3_kernels.gpu.journal import passed_before, recorder
from tests.dsv3_kernels.errors import calc_diff


def doubled(x: jax.Array, form: str) -> jax.Array:
    return x + x


def case_of(run, *comparisons: Comparison) -> CheckCase:
    default = Comparison("twice", lambda x: 2 * np.asarray(x), diff, 1e-6)
    return CheckCase("op", "case", lambda key: jax.random.normal(key, (33, 7)), run, comparisons or (default,))


def test_what_is_right_passes():
    verdict = checking.check(case_of(doubled), "xla", 0)
    assert (verdict.verdict, verdict.reasons) == ("passed", ())
    assert verdict.errors["twice"] < 1e-12
    assert verdict.line().startswith("ok")


def test_what_is_wrong_fails():
    """One element, a NaN, two runs that differ, a result elsewhere than in its buffer: each by its own message."""
    exact = Comparison("exact", lambda x: 2 * np.asarray(x), lambda x, y: jnp.abs(x - y).max(), 0.0)
    verdict = checking.check(case_of(lambda x, form: doubled(x, form).at[3, 4].add(1.0), exact), "xla", 0)
    assert "exact 1" in verdict.reasons[0]
    verdict = checking.check(case_of(lambda x, form: doubled(x, form).at[3, 4].set(jnp.nan)), "xla", 0)
    assert "twice nan" in verdict.reasons[0]
    assert verdict.line().startswith("FAILED")

    count = iter(range(100))

    def racing(x, form):
        return doubled(x, form) + jax.pure_callback(
            lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), "float32")
        )

    assert "two runs differ" in checking.check(case_of(racing), "xla", 0).reasons


def test_what_a_kernel_does_not_write_shows_as_nan():
    """A result that is the buffer itself in part: what a kernel that skips rows leaves."""
    lazy = jax.jit(lambda x, poison: poison.at[:10].set(x[:10]), donate_argnums=1)
    x = jnp.ones((33, 7))
    result = lazy(x, jnp.full_like(x, jnp.nan))
    assert not float(diff(result, x)) < 1
    run = checking.into_poison(lambda x: x + 1)
    assert run(x)[1], "the result of an ordinary program goes into the buffer it is given"


@pytest.mark.parametrize(
    ("error", "word", "reason"),
    [
        (NotImplementedError("K=200 is beyond this kernel"), "refused", "K=200 is beyond this kernel"),
        (TypeError("no such layout\nat length"), "failed", "TypeError: no such layout"),
        (SystemExit(0), "failed", "SystemExit: 0"),
        (jax.errors.JaxRuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\nat length"), "crashed", "CUDA_ERROR_ILLEGAL_ADDRESS"),
    ],
)
def test_whatever_a_case_raises_is_its_verdict(error, word, reason):
    def raising(x, form):
        raise error

    verdict = checking.check(case_of(raising), "xla", 0)
    assert (verdict.verdict, verdict.reasons) == (word, (reason,))
    assert word.upper() in verdict.line()


def test_a_verdict_survives_json():
    verdict = checking.check(case_of(lambda x, form: x * jnp.nan), "xla", 0)
    again = from_data(json.loads(json.dumps(verdict.as_data() | {"device": "cpu"}, allow_nan=False)))
    assert np.isnan(again.errors["twice"])
    assert again.reasons == verdict.reasons


def test_measures_on_the_device():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 60)).astype(np.float32)
    y = x + 0.03 * rng.standard_normal((100, 60)).astype(np.float32)
    assert float(diff(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(calc_diff(x, y), rel=1e-4)
    assert float(diff(jnp.zeros(3), jnp.zeros(3))) == 0
    wrong = jnp.asarray(x).at[5, 5].set(0.5 * x[5, 5] + 0.1)
    assert float(diff(wrong, jnp.asarray(x))) < 1e-3
    assert float(worst(wrong, jnp.asarray(x))) > 1
    assert float(worst(jnp.asarray(x).astype(jnp.bfloat16), jnp.asarray(x))) < 0.5
    assert np.isnan(worst(jnp.asarray(x).at[0, 0].set(jnp.nan), jnp.asarray(x)))
    assert float(worst(jnp.zeros((0, 4)), jnp.zeros((0, 4)))) == 0


def test_an_unwritten_row_or_a_wrong_scale_fails_the_criterion():
    rng = np.random.default_rng(1)
    exact = jnp.asarray(rng.standard_normal((256, 256)), jnp.float32)
    comparisons = fp8_comparisons(lambda x: x, lambda x: x, exact.size)
    for bad in (exact.at[200].set(0.0), exact.at[:128, :128].multiply(1.1), exact.at[77, 3].add(0.5)):
        assert any(float(c.error(bad, exact)) >= c.limit for c in comparisons)
    rounded = exact.astype(jnp.bfloat16)
    assert all(float(c.error(rounded, exact)) < c.limit for c in comparisons)


def test_names_are_unique():
    names = [(case.op, case.name) for case in check_cases()]
    assert len(set(names)) == len(names)
    assert {"fp8_gemm", "grouped_fp8_gemm", "grouped_fp8_gemm_masked", "grouped_fp8_gemm_k"} <= {op for op, _ in names}


def test_one_case_of_each_path_comes_first_then_ops_take_turns_small_cases_first():
    cases = check_cases()
    assert [case.path for case in cases[: len(PATHS)]] == list(PATHS)
    assert all(case.is_small for case in cases[: len(PATHS)])
    rest = cases[len(PATHS) :]
    assert not any(case.path for case in rest)
    num_small = sum(case.is_small for case in rest)
    assert all(case.is_small for case in rest[:num_small])
    for part in (rest[:num_small], rest[num_small:]):
        ops = {case.op for case in part}
        assert {case.op for case in part[: len(ops)]} == ops
    assert [x.name for x in in_turns([case_named(*each) for each in ("a1", "a2", "a3", "b1", "c1", "c2")])] == [
        *("a1", "b1", "c1", "a2", "c2", "a3")
    ]


@pytest.mark.slow
def test_kernels_refuse_the_cases_for_plain_forms_and_no_other():
    for case in check_cases():
        shapes = jax.eval_shape(case.make_inputs, jax.random.key(0))
        try:
            jax.eval_shape(lambda inputs, case=case: case.run(inputs, "pallas"), shapes)
            is_refused = False
        except NotImplementedError:
            is_refused = True
        assert is_refused == case.is_plain, (case.op, case.name)


def case_named(op: str, number: str) -> CheckCase:
    return case_of(doubled)._replace(op=op, name=op + number)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys, flags):
    assert check.main(["--seed", "1"]) == 3
    assert "No GPU here" in capsys.readouterr().out


@pytest.fixture
def flags(monkeypatch):
    """The environment that the program changes."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def test_only_a_run_that_reached_and_passed_all_exits_0(capsys, flags):
    plain = ["quantize_tiles", "--implementation", "xla", "--small"]
    assert check.main([*plain, "--only", "1x128_"]) == 0
    assert "2 passed, 0 failed, 0 refused, 0 hung, 0 crashed, 0 not reached" in capsys.readouterr().out
    assert check.main([*plain, "--seconds", "-1"]) == 1
    assert "6 not reached" in capsys.readouterr().out
    for wrong, message in (
        (["fp9_gemm"], "['fp9_gemm'] have no cases; known are"),
        (["--only", "no such name"], "no case is left"),
        (["--resume"], "add --out"),
        (["--cases", "no_such_module"], "no_such_module"),
        (["--cases", "json"], "offers no cases"),
        (["--cases", CASES, "right", "--out", "/dev/null/out"], "name another file"),
    ):
        assert check.main(["--implementation", "xla", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_cases_of_one_name_are_refused(monkeypatch):
    """A process is asked for a case by its name."""
    samples = importlib.import_module(CASES)
    monkeypatch.setattr(samples, "check_cases", lambda: [case_named("right", "x"), case_named("right", "x")])
    with pytest.raises(ValueError, match="several cases are called right rightx"):
        check_cases(module=CASES)


def test_verdicts_are_in_the_file_and_what_passed_is_left_out(capsys, flags, tmp_path):
    """Not what failed, not after a change of the sources, and whatever line was cut short."""
    path = tmp_path / "new" / "out.jsonl"
    given = ["--implementation", "xla", "--cases", CASES, "right", "wrong", "refusing", "--out", str(path)]
    assert check.main(given) == 1
    assert "1 passed, 1 failed, 1 refused, 0 hung, 0 crashed, 0 not reached" in capsys.readouterr().out
    path.write_text(path.read_text() + '[]\n{"op": "wrong", "na')
    assert check.main([*given, "--resume"]) == 1
    assert "0 passed, 1 failed, 1 refused, 0 hung, 0 crashed, 0 not reached, 1 passed before" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert [each["verdict"] for each in map(json.loads, lines[:3] + lines[5:])] == [
        *("passed", "failed", "refused", "failed", "refused")
    ]
    entry = json.loads(lines[0])
    assert (entry["op"], entry["implementation"], entry["device"]) == ("right", "xla", jax.devices()[0].device_kind)
    assert passed_before(path, entry) == {("right", "doubles")}
    for name in ("source", "device", "jax", "implementation"):
        assert passed_before(path, entry | {name: "another"}) == set()
    with recorder(path, {name: entry[name] for name in ("source", "device", "jax", "implementation")}) as record:
        record(from_data(entry)._replace(verdict="hung"))
    assert passed_before(path, entry) == set()


CASES = "tests.dsv3_kernels.check_samples"
SERVER = """
import json, os, subprocess, sys, time
print(json.dumps({"pid": os.getpid()}), flush=True)
for line in sys.stdin:
    wish = json.loads(line)["do"]
    if wish == "hang":
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
        print("child", child.pid, file=sys.stderr, flush=True)
        time.sleep(1000)
    if wish == "abort":
        os.abort()
    if wish == "leave":
        os._exit(7)
    print(json.dumps({"did": wish, "pid": os.getpid()}), flush=True)
"""


def test_a_hang_or_a_crash_costs_one_request():
    """And the process that hangs is killed with its children, having written where it was."""
    command = [sys.executable, "-S", "-c", SERVER]
    wishes = ["one", "two", "hang", "three", "abort", "leave", "last", "four"]
    requests = ({"do": wish} for wish in wishes)
    said: list[Any] = list(answers(command, requests, limit=3, is_last=lambda answer: answer["did"] == "last"))
    greeting, one, two, hung, three, aborted, left, last, four = said
    assert [each["did"] for each in (one, two, three, last, four)] == ["one", "two", "three", "last", "four"]
    assert one["pid"] == two["pid"] == greeting["pid"]
    assert len({each["pid"] for each in (one, three, last, four)}) == 4
    assert (hung.has_hung, hung.reason) == (True, "no answer in 3 s")
    assert "most recent call first" in hung.stderr
    child = int(hung.stderr.split()[1])
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
    assert (aborted.has_hung, aborted.reason) == (False, "its process was ended by SIGABRT")
    assert left == Lost(False, "its process ended with status 7", "")
    with pytest.raises(StartError, match="ended with status 1\nno greeting"):
        next(answers([sys.executable, "-S", "-c", "raise SystemExit('no greeting')"], requests, limit=3))


@pytest.mark.slow
def test_the_program_goes_on_after_cases_that_hang_and_crash(capsys, flags, tmp_path):
    path = tmp_path / "out.jsonl"
    given = ["--implementation", "xla", "--cases", CASES, "--isolate", "--limit", "20", "--out", str(path)]
    assert check.main(given) == 1
    found = {entry["name"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    assert {name: entry["verdict"] for name, entry in found.items()} == {
        "sleeps for ever": "hung",
        "aborts": "crashed",
        "loses its device": "crashed",
        "adds one": "failed",
        "doubles": "passed",
        "takes nothing": "refused",
    }
    assert "in sleep_for_ever" in found["sleeps for ever"]["stderr"]
    assert "in abort" in found["aborts"]["stderr"]
    assert "1 passed, 1 failed, 1 refused, 1 hung, 2 crashed, 0 not reached" in capsys.readouterr().out
    assert check.main([*given, "--resume", "right"]) == 0
    assert "1 passed before" in capsys.readouterr().out


@pytest.mark.slow
def test_every_small_case_of_the_plain_form_passes(capsys, flags):
    assert check.main(["--implementation", "xla", "--small", "--seconds", "1e9"]) == 0, capsys.readouterr().out
    assert "0 failed, 0 refused, 0 hung, 0 crashed, 0 not reached" in capsys.readouterr().out
