"""The dense FP8 GEMM: DeepSeek's values, the implementations against each other, and what a caller may not pass."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_kernels import QTensor, dispatch, fp8_gemm, quantize_tiles
from dsv3_kernels.gemm import cases
from dsv3_kernels.gpu.case import fp8_limit
from dsv3_kernels.operands import checked_operand
from tests.dsv3_kernels.errors import calc_diff
from tests.fresh import fresh_rng

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8_gate.npz")
SMALL = [case for case in cases.CASES if case.is_small]
FORMS = ["reference", "xla"]
SAME = 1e-10
"""calc_diff of two orders of float32 additions."""


def golden(name: str) -> np.ndarray:
    return GOLDEN[f"gemm/{name}"]


def golden_operand(name: str) -> QTensor:
    return QTensor(golden(f"{name}q").view(ml_dtypes.float8_e4m3fn), golden(f"{name}sf"))


def random_operand(rng: np.random.Generator, rows: int, columns: int, row_tile: int) -> QTensor:
    x = rng.standard_normal((rows, columns)).astype(ml_dtypes.bfloat16)
    return quantize_tiles(x, tile=(row_tile, 128))


def operands(m: int, n: int, k: int) -> tuple[QTensor, QTensor]:
    rng = fresh_rng()
    return random_operand(rng, m, k, 1), random_operand(rng, n, k, 128)


def doubled(q: QTensor) -> QTensor:
    return q._replace(scales=2 * q.scales)


gemm = jax.jit(fp8_gemm, static_argnames=("out_dtype", "implementation"))


@pytest.mark.parametrize("form", FORMS)
def test_golden(form):
    a, b = golden_operand("a"), golden_operand("b")
    out = gemm(a, b, out_dtype=jnp.float32, implementation=form)
    assert calc_diff(out, golden("deq_f64")) < SAME
    np.testing.assert_allclose(out, golden("out_f32"), rtol=1e-5, atol=1e-4)
    exact = calc_diff(out, golden("exact_f64"))
    assert abs(exact - golden("calc_diff_vs_exact")) < 1e-8
    assert exact < 1e-3
    rounded = gemm(a, b, implementation=form)
    assert rounded.dtype == jnp.bfloat16
    steps = np.asarray(rounded).view(np.int16).astype(int) - golden("out_bf16").view(np.int16)
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_error_is_that_of_quantising(case, form, rng):
    x, w = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((case.m, case.k), (case.n, case.k)))
    a, b = quantize_tiles(x, tile=(1, 128)), quantize_tiles(w, tile=case.b_tile)
    sums = rng.standard_normal((case.m, case.n)).astype(np.float32) if case.accumulates else None
    out = gemm(a, b, out_dtype=case.out_dtype, accumulate_into=sums, implementation=form)
    assert out.shape == (case.m, case.n)
    assert out.dtype == case.out_dtype
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert calc_diff(out, exact if sums is None else exact + sums) < fp8_limit(exact.size)


@settings(max_examples=10, deadline=None)
@given(
    m=st.integers(0, 70), n=st.integers(1, 200), k=st.integers(1, 400), row_tile=st.sampled_from([1, 128]),
    accumulates=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_forms_agree(m, n, k, row_tile, accumulates, seed):
    rng = np.random.default_rng(seed)
    a, b = random_operand(rng, m, k, 1), random_operand(rng, n, k, row_tile)
    sums = rng.standard_normal((m, n)).astype(np.float32) if accumulates else None
    by_form = [gemm(a, b, out_dtype=jnp.float32, accumulate_into=sums, implementation=form) for form in FORMS]
    assert calc_diff(*by_form) < SAME


@pytest.mark.parametrize("form", FORMS)
def test_scales_multiply_their_row_and_block_only(form):
    a, b = operands(5, 140, 384)
    product = functools.partial(gemm, out_dtype=jnp.float32, implementation=form)
    full = np.asarray(product(a, b))
    np.testing.assert_array_equal(product(doubled(a), b), 2 * full)
    np.testing.assert_array_equal(product(a, doubled(b)), 2 * full)
    for operand, others in (("a", (np.arange(5) != 3, slice(None))), ("b", (slice(None), np.arange(140) < 128))):

        def with_factor(factor, operand=operand):
            pair = {"a": QTensor(a.values, a.scales.copy()), "b": QTensor(b.values, b.scales.copy())}
            pair[operand].scales[3 if operand == "a" else 1, 1] *= factor
            return np.asarray(product(pair["a"], pair["b"]))

        none, twice = with_factor(0), with_factor(2)
        np.testing.assert_array_equal(twice[others], full[others])
        np.testing.assert_allclose(twice - full, full - none, atol=1e-3)
        assert np.abs(full - none).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_stays_in_its_row(form, bad):
    x = np.random.default_rng(0).standard_normal((5, 384)).astype(np.float32)
    x[4, 200] = bad
    b = operands(5, 140, 384)[1]
    out = np.asarray(gemm(quantize_tiles(x, tile=(1, 128)), b, out_dtype=jnp.float32, implementation=form))
    assert not np.isfinite(out[4]).any()
    assert np.isfinite(out[:4]).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_give_zeros(form):
    x = np.random.default_rng(0).standard_normal((5, 384)).astype(np.float32)
    x[2] = 0
    b = operands(5, 140, 384)[1]
    out = np.asarray(gemm(quantize_tiles(x, tile=(1, 128)), b, out_dtype=jnp.float32, implementation=form))
    np.testing.assert_array_equal(out.any(axis=1), [True, True, False, True, True])


def test_fresh_inputs_of_a_case_with_power_of_two_scales():
    case = cases.GemmCase("", 17, 130, 256, "", cases.WEIGHT_GRADIENT, accumulates=True)
    make = jax.jit(cases.make_inputs, static_argnums=0, static_argnames="scale")
    a, b, sums, exact_a, exact_b = make(case, jax.random.key(1), scale="ue8m0")
    assert (np.frexp(a.scales)[0] == 0.5).all()
    assert b.scales.shape == (130, 2)
    exact = np.asarray(exact_a, np.float64) @ np.asarray(exact_b, np.float64).T + np.asarray(sums)
    for form in FORMS:
        out = gemm(a, b, out_dtype=jnp.float32, accumulate_into=sums, implementation=form)
        assert calc_diff(out, exact) < fp8_limit(exact.size)


@pytest.mark.parametrize("form", FORMS)
def test_under_vmap(form):
    a, b = operands(24, 40, 256)
    product = functools.partial(fp8_gemm, out_dtype=jnp.float32, implementation=form)
    batch = jax.tree.map(lambda x: x.reshape(3, 8, -1), a)
    out = jax.jit(jax.vmap(product, in_axes=(0, None)))(batch, b)
    assert calc_diff(out.reshape(24, 40), gemm(a, b, out_dtype=jnp.float32, implementation=form)) < SAME


def test_names_of_cases_are_unique_and_hold_the_published_table():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert len(cases.HEADLINE) == 18
    assert {case.k for case in cases.HEADLINE} == {7168, 1536, 512, 16384, 2048}


A = QTensor(np.zeros((4, 256), ml_dtypes.float8_e4m3fn), np.ones((4, 2), np.float32))
B = QTensor(np.zeros((130, 256), ml_dtypes.float8_e4m3fn), np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (A._replace(values=A.values.astype(np.float32)), B, {}, r"a.values has dtype float32.*quantize_tiles"),
        (A, B._replace(values=B.values.view(ml_dtypes.float8_e5m2)), {}, r"b.values has dtype float8_e5m2"),
        (A._replace(scales=A.scales.astype(ml_dtypes.bfloat16)), B, {}, r"a.scales has dtype bfloat16.*float32"),
        (A._replace(scales=np.ones((1, 2), np.float32)), B, {}, r"a.scales.*\(1, 2\).*\(4, 2\) \(tile=\(1, 128\)\)"),
        (A, B._replace(scales=np.ones((2, 130), np.float32)), {}, r"b.scales.*\(2, 2\).*or \(130, 2\)"),
        (QTensor(A.values[:, :128], A.scales[:, :1]), B, {}, r"differ in K.*pass b as \[N, K\]"),
        (QTensor(A.values[None], A.scales[None]), B, {}, r"\(1, 4, 256\) and must have 2 axes"),
        (A, B, {"out_dtype": jnp.float16}, r"out_dtype=float16 must be bfloat16 or float32"),
        (A, B, {"accumulate_into": jnp.zeros((4, 130))}, r"out_dtype=bfloat16 with accumulate_into; pass out_dtype"),
        (
            A, B, {"accumulate_into": jnp.zeros((130, 4)), "out_dtype": jnp.float32},
            r"float32\[130, 4\] and must be float32\[4, 130\]",
        ),
        (
            A, B, {"accumulate_into": jnp.zeros((4, 130), jnp.bfloat16), "out_dtype": jnp.float32},
            r"bfloat16\[4, 130\] and must be float32",
        ),
        (A, B, {"implementation": "triton"}, r"'triton' of fp8_gemm is unknown"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        fp8_gemm(a, b, **options)
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(fp8_gemm, **options))(a, b)


def test_a_plain_array_is_no_operand():
    """Asked below the public functions, whose annotations the tests enforce."""
    with pytest.raises(ValueError, match=r"fp8_gemm: a is a ndarray and must be a QTensor.*quantize_tiles"):
        checked_operand("fp8_gemm", "a", np.zeros((4, 256), np.float32), rank=2, row_tiles=(1,))


@pytest.mark.skipif(dispatch.why_no_pallas() is None, reason="a Hopper GPU is here")
def test_asking_for_the_kernel_on_a_cpu_says_why():
    with pytest.raises(NotImplementedError, match=r"fp8_gemm.*needs (a Hopper GPU|jax).*leave it None"):
        fp8_gemm(A, B, implementation="pallas")
