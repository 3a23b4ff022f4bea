"""The check program: it passes what is right, fails what is wrong, and says where it cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import check
from dsv3_kernels.gpu.case import CheckCase, Comparison, check_cases, diff, fp8_comparisons, worst
from tests.dsv3_kernels.errors import calc_diff


def doubled(x: jax.Array, form: str) -> jax.Array:
    return x + x


def case_of(run, *comparisons: Comparison) -> CheckCase:
    default = Comparison("twice", lambda x: 2 * np.asarray(x), diff, 1e-6)
    return CheckCase("op", "case", lambda key: jax.random.normal(key, (33, 7)), run, comparisons or (default,))


def test_what_is_right_passes():
    verdict = check.check(case_of(doubled), "xla", 0)
    assert verdict.failures == ()
    assert verdict.errors["twice"] < 1e-12
    assert verdict.line().startswith("ok")


def test_what_is_wrong_fails():
    """One element, a NaN, two runs that differ, a result elsewhere than in its buffer: each by its own message."""
    exact = Comparison("exact", lambda x: 2 * np.asarray(x), lambda x, y: jnp.abs(x - y).max(), 0.0)
    verdict = check.check(case_of(lambda x, form: doubled(x, form).at[3, 4].add(1.0), exact), "xla", 0)
    assert "exact 1" in verdict.failures[0]
    verdict = check.check(case_of(lambda x, form: doubled(x, form).at[3, 4].set(jnp.nan)), "xla", 0)
    assert "twice nan" in verdict.failures[0]
    assert verdict.line().startswith("FAILED")

    count = iter(range(100))

    def racing(x, form):
        return doubled(x, form) + jax.pure_callback(
            lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), "float32")
        )

    assert "two runs differ" in check.check(case_of(racing), "xla", 0).failures


def test_what_a_kernel_does_not_write_shows_as_nan():
    """A result that is the buffer itself in part: what a kernel that skips rows leaves."""
    lazy = jax.jit(lambda x, poison: poison.at[:10].set(x[:10]), donate_argnums=1)
    x = jnp.ones((33, 7))
    result = lazy(x, jnp.full_like(x, jnp.nan))
    assert not float(diff(result, x)) < 1
    run = check.into_poison(lambda x: x + 1)
    assert run(x)[1], "the result of an ordinary program goes into the buffer it is given"


def test_a_form_that_refuses_is_no_failure():
    def refuse(x, form):
        raise NotImplementedError("K=200 is beyond this kernel")

    verdict = check.check(case_of(refuse), "xla", 0)
    assert verdict.failures == ()
    assert "refused" in verdict.line()
    assert "K=200" in verdict.line()


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


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert check.main(["--seed", "1"]) == 0
    assert "No GPU here" in capsys.readouterr().out


def test_small_cases_of_the_plain_form_run_anywhere(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert check.main(["quantize_tiles", "--form", "xla", "--small"]) == 0
    assert "6 passed, 0 failed, 0 refused, 0 not reached" in capsys.readouterr().out
    assert check.main(["quantize_tiles", "--form", "xla", "--small", "--seconds", "-1"]) == 0
    assert "6 not reached" in capsys.readouterr().out
    assert check.main(["fp9_gemm"]) == 2
    assert "['fp9_gemm'] have no cases; known are" in capsys.readouterr().err


@pytest.mark.slow
def test_every_small_case_of_the_plain_form_passes(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert check.main(["--form", "xla", "--small", "--seconds", "1e9"]) == 0, capsys.readouterr().out
    assert "0 failed, 0 refused, 0 not reached" in capsys.readouterr().out
