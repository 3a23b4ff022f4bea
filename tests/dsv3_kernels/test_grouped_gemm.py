"""The grouped FP8 GEMMs: every group against its own dense matmul, empty groups, skipped blocks, padding."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_kernels import (
    QTensor,
    dispatch,
    grouped_fp8_gemm,
    grouped_fp8_gemm_k,
    grouped_fp8_gemm_masked,
    quantize_tiles,
)
from dsv3_kernels.gpu.case import fp8_limit
from dsv3_kernels.grouped_gemm import cases
from tests.dsv3_kernels.errors import calc_diff

FORMS = ["reference", "xla"]
SAME = 1e-10
"""calc_diff of two orders of float32 additions."""
CONTIGUOUS = [case for case in cases.CONTIGUOUS_CASES if case.is_small]
MASKED = [case for case in cases.MASKED_CASES if case.is_small]
CONTRACTION = [case for case in cases.CONTRACTION_CASES if case.is_small]
named = pytest.mark.parametrize("form", FORMS)


contiguous_gemm = jax.jit(grouped_fp8_gemm, static_argnames=("out_dtype", "implementation"))
masked_gemm = jax.jit(grouped_fp8_gemm_masked, static_argnames=("out_dtype", "implementation"))
contraction_gemm = jax.jit(grouped_fp8_gemm_k, static_argnames=("num_groups", "implementation"))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def random_operand(rng: np.random.Generator, shape: tuple[int, ...], row_tile: int = 1) -> QTensor:
    return quantize_tiles(rng.standard_normal(shape).astype(ml_dtypes.bfloat16), tile=(row_tile, 128))


def exact_contiguous(a, b, block_group) -> np.ndarray:
    out = np.zeros((a.shape[0], b.shape[1]))
    for block, group in enumerate(np.asarray(block_group)):
        rows = slice(128 * block, 128 * (block + 1))
        if group >= 0:
            out[rows] = float64(a[rows]) @ float64(b[group]).T
    return out


def exact_contraction(a, b, block_group, num_groups) -> np.ndarray:
    out = np.zeros((num_groups, a.shape[0], b.shape[0]))
    for block, group in enumerate(np.asarray(block_group)):
        columns = slice(128 * block, 128 * (block + 1))
        if group >= 0:
            out[group] += float64(a[:, columns]) @ float64(b[:, columns]).T
    return out


@named
@pytest.mark.parametrize("case", CONTIGUOUS, ids=lambda case: case.name)
def test_contiguous_error_is_that_of_quantising(case, form, rng):
    x, w, block_group = normal(rng, case.m, case.k), normal(rng, len(case.blocks), case.n, case.k), case.block_group
    a, b = quantize_tiles(x, tile=(1, 128)), quantize_tiles(w, tile=(128, 128))
    out = contiguous_gemm(a, b, block_group, implementation=form)
    assert out.shape == (case.m, case.n)
    assert out.dtype == jnp.bfloat16
    exact = exact_contiguous(x, w, block_group)
    assert calc_diff(out, exact) < fp8_limit(exact.size)
    np.testing.assert_array_equal(float64(out)[(exact == 0).all(axis=1)], 0)


@named
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_masked_error_is_that_of_quantising(case, form, rng):
    groups = len(case.valid)
    x, w = normal(rng, groups, case.m, case.k), normal(rng, groups, case.n, case.k)
    a, b = quantize_tiles(x, tile=(1, 128)), quantize_tiles(w, tile=(128, 128))
    out = masked_gemm(a, b, np.array(case.valid, np.int32), implementation=form)
    assert out.shape == (len(case.valid), case.m, case.n)
    for group, count in enumerate(case.valid):
        assert calc_diff(out[group, :count], float64(x[group, :count]) @ float64(w[group]).T) < fp8_limit(
            count * case.n
        )
        np.testing.assert_array_equal(float64(out[group, count:]), 0)


@named
@pytest.mark.parametrize("case", CONTRACTION, ids=lambda case: case.name)
def test_contraction_error_is_that_of_quantising(case, form, rng):
    groups, block_group = len(case.blocks), case.block_group
    x, w = normal(rng, case.m, case.k), normal(rng, case.n, case.k)
    a, b = quantize_tiles(x, tile=(1, 128)), quantize_tiles(w, tile=(1, 128))
    sums = normal(rng, groups, case.m, case.n).astype(np.float32) if case.accumulates else None
    out = contraction_gemm(a, b, block_group, num_groups=groups, accumulate_into=sums, implementation=form)
    assert out.dtype == jnp.float32
    exact = exact_contraction(x, w, block_group, groups)
    assert calc_diff(out, exact if sums is None else exact + float64(sums)) < fp8_limit(exact.size)
    for group, blocks in enumerate(case.blocks):
        if blocks == 0:
            np.testing.assert_array_equal(out[group], 0 if sums is None else sums[group])


group_ids = st.lists(st.integers(-1, 2), min_size=0, max_size=5)


@settings(max_examples=4, deadline=None)
@given(ids=group_ids, n=st.integers(1, 200), k=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_contiguous_forms_agree_on_any_order_of_groups(ids, n, k, seed):
    rng = np.random.default_rng(seed)
    a, b = random_operand(rng, (128 * len(ids), k)), random_operand(rng, (3, n, k), 128)
    block_group = np.array(ids, np.int32)
    by_form = [contiguous_gemm(a, b, block_group, out_dtype=jnp.float32, implementation=form) for form in FORMS]
    assert calc_diff(*by_form) < SAME


@settings(max_examples=4, deadline=None)
@given(
    valid=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    n=st.integers(1, 200), k=st.integers(1, 300), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_masked_forms_agree(valid, n, k, seed):
    rng = np.random.default_rng(seed)
    a, b = random_operand(rng, (len(valid), 40, k)), random_operand(rng, (len(valid), n, k), 128)
    rows = np.array(valid, np.int32)
    by_form = [masked_gemm(a, b, rows, out_dtype=jnp.float32, implementation=form) for form in FORMS]
    assert calc_diff(*by_form) < SAME


@settings(max_examples=4, deadline=None)
@given(
    blocks=st.lists(st.integers(0, 2), min_size=1, max_size=4), skipped=st.integers(0, 2),
    m=st.integers(1, 60), n=st.integers(1, 60), accumulates=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_contraction_forms_agree(blocks, skipped, m, n, accumulates, seed):
    rng = np.random.default_rng(seed)
    case = cases.ContractionCase("", tuple(blocks), m, n, skipped)
    a, b = random_operand(rng, (m, case.k)), random_operand(rng, (n, case.k))
    sums = rng.standard_normal((len(blocks), m, n)).astype(np.float32) if accumulates else None
    by_form = [
        contraction_gemm(a, b, case.block_group, num_groups=len(blocks), accumulate_into=sums, implementation=form)
        for form in FORMS
    ]
    assert calc_diff(*by_form) < SAME


@named
def test_order_of_blocks_and_names_of_groups_do_not_matter(form, rng):
    block_group = np.array([0, 2, 2, -1, 1], np.int32)
    a, b = random_operand(rng, (640, 256)), random_operand(rng, (3, 72, 256), 128)
    product = functools.partial(contiguous_gemm, out_dtype=jnp.float32, implementation=form)
    full = np.asarray(product(a, b, block_group))
    order = rng.permutation(5)
    rows = (128 * order[:, None] + np.arange(128)).ravel()
    permuted = product(QTensor(a.values[rows], a.scales[rows]), b, block_group[order])
    np.testing.assert_array_equal(permuted, full[rows])
    old_names = np.array([1, 2, 0])
    new_names = np.array([2, 0, 1, -1], np.int32)
    renamed = product(a, QTensor(b.values[old_names], b.scales[old_names]), new_names[block_group])
    np.testing.assert_array_equal(renamed, full)


@named
def test_what_is_skipped_cannot_spread(form):
    """NaN in skipped blocks, in padding rows, in skipped parts of the contraction."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((256, 128)).astype(np.float32)
    x[128:] = np.nan
    a, b = quantize_tiles(x, tile=(1, 128)), random_operand(rng, (1, 64, 128), 128)
    out = contiguous_gemm(a, b, np.array([0, -1], np.int32), implementation=form)
    assert np.isfinite(float64(out)).all()
    assert not float64(out[128:]).any()
    slab = QTensor(a.values[None], a.scales[None])
    out = masked_gemm(slab, b, np.array([128], np.int32), implementation=form)
    assert np.isfinite(float64(out)).all()
    along = quantize_tiles(np.ascontiguousarray(x.T), tile=(1, 128))
    out = contraction_gemm(along, along, np.array([0, -1], np.int32), num_groups=2, implementation=form)
    assert np.isfinite(out).all()
    assert np.asarray(out[0]).any()


@named
def test_a_token_that_is_nan_stays_in_its_row(form):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((256, 256)).astype(np.float32)
    x[77, 200] = np.nan
    a, b = quantize_tiles(x, tile=(1, 128)), random_operand(rng, (2, 64, 256), 128)
    out = float64(contiguous_gemm(a, b, np.array([1, 0], np.int32), implementation=form))
    assert np.isnan(out[77]).all()
    assert np.isfinite(out[np.arange(256) != 77]).all()


@named
def test_under_vmap_and_shard_map(form, rng):
    a, b = random_operand(rng, (512, 256)), random_operand(rng, (2, 40, 256), 128)
    block_group = np.array([0, 1, 1, -1], np.int32)
    gemm = functools.partial(contiguous_gemm, out_dtype=jnp.float32, implementation=form)
    full = gemm(a, b, block_group)
    slabs = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (a, block_group))
    batched = jax.jit(jax.vmap(gemm, in_axes=(0, None, 0)))(slabs[0], b, slabs[1])
    assert calc_diff(batched.reshape(full.shape), full) < SAME
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(gemm, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    assert calc_diff(jax.jit(mapped)(a, b, block_group), full) < SAME
    gradient = functools.partial(contraction_gemm, num_groups=2, implementation=form)
    along, ids = random_operand(np.random.default_rng(5), (24, 512)), np.array([0, 0, 0, 1], np.int32)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P(None, "data"))
    assert calc_diff(jax.jit(mapped)(along, along, ids), gradient(along, along, ids)) < SAME
    masked = functools.partial(masked_gemm, implementation=form)
    slab, counts = QTensor(*(x.reshape(2, -1, x.shape[-1]) for x in a)), np.array([0, 200], np.int32)
    mapped = jax.shard_map(masked, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert calc_diff(jax.jit(mapped)(slab, b, counts), masked(slab, b, counts)) < SAME


def test_names_of_cases_are_unique():
    for table in (cases.CONTIGUOUS_CASES, cases.MASKED_CASES, cases.CONTRACTION_CASES):
        names = [case.name for case in table]
        assert len(set(names)) == len(names)
    assert all(count <= case.m for case in cases.MASKED_CASES for count in case.valid)


def zeros(values: tuple[int, ...], scales: tuple[int, ...]) -> QTensor:
    return QTensor(np.zeros(values, ml_dtypes.float8_e4m3fn), np.ones(scales, np.float32))


ROWS, WEIGHTS, SLABS = zeros((256, 256), (256, 2)), zeros((3, 130, 256), (3, 2, 2)), zeros((3, 40, 256), (3, 40, 2))
IDS, VALID = np.zeros(2, np.int32), np.zeros(3, np.int32)
contiguous, masked, along = grouped_fp8_gemm, grouped_fp8_gemm_masked, grouped_fp8_gemm_k


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        (contiguous, (zeros((200, 256), (200, 2)), WEIGHTS, IDS), {}, r"M=200 rows.*no multiple of 128; pad"),
        (contiguous, (ROWS, WEIGHTS, np.zeros(3, np.int32)), {}, r"block_group has shape \(3,\) and must be \(2,\)"),
        (contiguous, (ROWS, WEIGHTS, np.zeros(2, np.int16)), {}, r"dtype int16 and must be int32"),
        (contiguous, (ROWS, zeros((130, 256), (2, 2)), IDS), {}, r"b.values.*must have 3 axes"),
        (contiguous, (ROWS, zeros((3, 130, 256), (3, 130, 2)), IDS), {}, r"b.scales.*\(3, 2, 2\)"),
        (contiguous, (ROWS, zeros((3, 130, 128), (3, 2, 1)), IDS), {}, r"differ in K"),
        (contiguous, (ROWS, WEIGHTS, IDS), {"out_dtype": jnp.int8}, r"out_dtype=int8 must be"),
        (masked, (SLABS, zeros((2, 130, 256), (2, 2, 2)), VALID), {}, r"differ in G"),
        (masked, (SLABS, WEIGHTS, IDS), {}, r"valid_rows has shape \(2,\) and must be \(3,\); give one"),
        (masked, (ROWS, WEIGHTS, VALID), {}, r"a.values.*must have 3 axes"),
        (along, (zeros((8, 200), (8, 2)), zeros((8, 200), (8, 2)), IDS), {"num_groups": 2}, r"K=200.*pad each group"),
        (along, (ROWS, ROWS, IDS), {"num_groups": 0}, r"num_groups=0 must be at least 1"),
        (along, (ROWS, ROWS, VALID), {"num_groups": 2}, r"block_group.*\(2,\).*for each 128 elements of K"),
        (
            along, (ROWS, ROWS, IDS), {"num_groups": 2, "accumulate_into": jnp.zeros((256, 256))},
            r"float32\[256, 256\] and must be float32\[2, 256, 256\]",
        ),
        (along, (ROWS, zeros((256, 256), (2, 2)), IDS), {"num_groups": 2}, r"b.scales.*\(256, 2\)"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(op, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        op(*arguments, **options)
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(op, **options))(*arguments)


def groups(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        (contiguous, (ROWS, WEIGHTS, groups(0, 3)), {}, r"block_group holds 3 and must be -1 to 2; b has so many"),
        (contiguous, (ROWS, WEIGHTS, groups(-2, 0)), {}, r"block_group holds -2 and must be -1 to 2"),
        (masked, (SLABS, WEIGHTS, groups(0, 1, 10**6)), {}, r"valid_rows holds 1000000 and must be 0 to \d+; a has"),
        (masked, (SLABS, WEIGHTS, groups(0, -1, 0)), {}, r"valid_rows holds -1 and must be 0 to"),
        (along, (ROWS, ROWS, groups(0, 2)), {"num_groups": 2}, r"block_group holds 2 and must be -1 to 1; num_groups"),
        (
            along, (zeros((8, 384), (8, 3)), zeros((8, 384), (8, 3)), groups(1, 0, 1)), {"num_groups": 2},
            r"blocks of group 1 in block_group are not side by side; sort",
        ),
    ],
)  # fmt: skip
def test_refuses_groups_that_cannot_be(op, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        op(*arguments, **options)


def test_skipped_blocks_may_lie_anywhere():
    rows = zeros((8, 640), (8, 5))
    assert along(rows, rows, groups(-1, 1, -1, 0, 0), num_groups=2).shape == (2, 8, 8)


@pytest.mark.skipif(dispatch.why_no_pallas() is None, reason="a Hopper GPU is here")
def test_asking_for_a_kernel_on_a_cpu_says_why():
    for op, arguments, options in (
        (contiguous, (ROWS, WEIGHTS, IDS), {}),
        (masked, (SLABS, WEIGHTS, VALID), {}),
        (along, (ROWS, ROWS, IDS), {"num_groups": 2}),
    ):
        with pytest.raises(NotImplementedError, match=r"needs (a Hopper GPU|jax).*leave it None"):
            op(*arguments, implementation="pallas", **options)
