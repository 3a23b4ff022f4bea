"""The fused casts: their bits in every implementation, what survives a transposition, what a NaN or infinity spoils."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3_kernels as kernels
from dsv3_kernels import dispatch
from dsv3_kernels.casts import bench, cases, reference
from dsv3_kernels.quantize import QTensor, dequantize_tiles, quantize_tiles
from tests.dsv3_kernels.errors import calc_diff

TOKEN, BLOCK = reference.TOKEN, reference.BLOCK
OPS = ("cast_tokens", "swiglu_cast", "requantize_transposed", "cast_blocks")


def random_matrix(seed: int, rows: int, columns: int, dtype: str = "bfloat16") -> np.ndarray:
    """Normal values whose rows and columns have magnitudes from 2^-20 to 2^6, and a row of zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)) * 2.0 ** rng.integers(-14, 4, size=(rows, 1))
    x *= 2.0 ** rng.integers(-6, 3, size=(1, columns))
    x[rng.integers(rows)] = 0
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def argument(op: str, x: np.ndarray, scale: str = "float32"):
    """The argument of `op` made from x."""
    return quantize_tiles(x, tile=TOKEN, scale=scale) if op == "requantize_transposed" else x


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def assert_same(actual: QTensor, expected: QTensor) -> None:
    np.testing.assert_array_equal(bits(actual.scales), bits(expected.scales))
    np.testing.assert_array_equal(bits(actual.values), bits(expected.values))


def on_device(q):
    return jax.tree.map(jnp.asarray, q)


@functools.cache
def compiled(op: str):
    return jax.jit(getattr(kernels, op), static_argnames="scale")


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@pytest.mark.parametrize("op", ["cast_tokens", "requantize_transposed", "cast_blocks"])
@given(shape=shapes, seed=st.integers(0, 2**32 - 1), scale=st.sampled_from(["float32", "ue8m0"]))
@settings(max_examples=6, deadline=None)
def test_compiled_and_numpy_forms_have_the_same_bits(op, shape, seed, scale):
    """XLA may fuse, but not rewrite the divisions."""
    value = argument(op, random_matrix(seed, *shape))
    assert_same(compiled(op)(on_device(value), scale=scale), getattr(reference, op)(value, scale=scale))


@pytest.mark.parametrize("case", [case for case in cases.UGLY if case.op != "swiglu_cast"], ids=str)
def test_ugly_shapes_have_the_bits_of_quantize_tiles(case):
    x = random_matrix(case.rows, case.rows, case.columns)
    value = argument(case.op, x)
    tile = BLOCK if case.op == "cast_blocks" else TOKEN
    plain = dequantize_tiles(value, tile=TOKEN).T if case.op == "requantize_transposed" else x
    assert_same(compiled(case.op)(on_device(value)), quantize_tiles(plain, tile=tile))


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("case", [case for case in cases.UGLY if case.op == "swiglu_cast"], ids=str)
def test_swiglu_is_that_of_float32_before_the_cast(case, scale):
    """Against float64: exp is not the same to the last bit everywhere, so one step of E4M3 is allowed."""
    x = random_matrix(case.rows, case.rows, case.columns)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    product = gate / (1 + np.exp(-gate)) * up
    expected = quantize_tiles(product.astype(np.float32), tile=TOKEN, scale=scale)
    for q in (compiled("swiglu_cast")(jnp.asarray(x), scale=scale), reference.swiglu_cast(x, scale=scale)):
        np.testing.assert_allclose(q.scales, expected.scales, rtol=0 if scale == "ue8m0" else 4e-7)
        steps = np.abs(bits(q.values).astype(int) - bits(expected.values).astype(int))
        assert steps.max() <= 1
        assert (steps > 0).mean() < 0.01


def test_swiglu_at_its_ends():
    gate_up = jnp.array([[-1e30, -200.0, 0.0, 200.0, 2.0, 2.0, 2.0, 2.0]], jnp.float32)
    product = dequantize_tiles(kernels.swiglu_cast(gate_up), tile=TOKEN)
    np.testing.assert_array_equal(product, [[0.0, 0.0, 0.0, 400.0]])


@pytest.mark.parametrize("op", ["cast_tokens", "swiglu_cast", "cast_blocks"])
def test_a_batch_is_its_members(op):
    x = jnp.stack([jnp.asarray(random_matrix(seed, 130, 260)) for seed in range(2)])[None]
    batched = compiled(op)(x)
    for index in range(2):
        assert_same(QTensor(batched.values[0, index], batched.scales[0, index]), compiled(op)(x[0, index]))


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_transposition_with_powers_of_two_loses_only_subnormal_bits(shape, seed):
    q = quantize_tiles(random_matrix(seed, *shape), tile=TOKEN, scale="ue8m0")
    t = reference.requantize_transposed(q, scale="ue8m0")
    before, after = dequantize_tiles(q, tile=TOKEN).T, dequantize_tiles(t, tile=TOKEN)
    scales = np.repeat(t.scales, 128, axis=1)[:, : before.shape[1]]
    is_normal = np.abs(before) >= scales * 2.0**-6
    np.testing.assert_array_equal(after[is_normal], before[is_normal])
    assert (np.abs(after - before) <= scales * 2.0**-10).all()


@given(shape=shapes, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_casting_a_cast_with_powers_of_two_changes_nothing(shape, seed):
    q = reference.cast_tokens(random_matrix(seed, *shape), scale="ue8m0")
    again = reference.cast_tokens(dequantize_tiles(q, tile=TOKEN), scale="ue8m0")
    np.testing.assert_array_equal(dequantize_tiles(again, tile=TOKEN), dequantize_tiles(q, tile=TOKEN))


def test_transposition_with_float32_scales_is_within_two_roundings():
    x = np.random.default_rng(0).normal(size=(300, 260)).astype(np.float32)
    t = reference.requantize_transposed(quantize_tiles(x, tile=TOKEN), scale="float32")
    once = calc_diff(dequantize_tiles(quantize_tiles(x, tile=TOKEN), tile=TOKEN), x)
    assert once < calc_diff(dequantize_tiles(t, tile=TOKEN).T, x) < 2.1 * once


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", OPS)
def test_a_bad_number_spoils_its_tile_only(op, bad, scale):
    x = random_matrix(3, 256, 512, "float32")
    spoilt = x.copy()
    spoilt[130, 5] = bad
    good, q = (compiled(op)(on_device(argument(op, each)), scale=scale) for each in (x, spoilt))
    differs = np.asarray((q.scales != good.scales) | jnp.isnan(q.scales))
    row, column = {"cast_blocks": (1, 0), "requantize_transposed": (slice(0, 128), 1)}.get(op, (130, 0))
    expected = np.zeros_like(differs)
    expected[row, column] = True
    np.testing.assert_array_equal(differs, expected)
    elsewhere = ~np.repeat(np.repeat(expected, 128 if op == "cast_blocks" else 1, 0), 128, 1)
    elsewhere = elsewhere[: q.values.shape[0], : q.values.shape[1]]
    np.testing.assert_array_equal(bits(q.values)[elsewhere], bits(good.values)[elsewhere])


def test_tiny_and_huge_tiles():
    x = jnp.concatenate([jnp.full((1, 128), value, jnp.float32) for value in (0.0, 1e-6, 3e38)], axis=1)
    q = compiled("cast_tokens")(x)
    floor = np.float32(1e-4) / np.float32(448)
    np.testing.assert_array_equal(q.scales, [[floor, floor, np.float32(3e38) / np.float32(448)]])
    np.testing.assert_array_equal(q.values.astype(jnp.float32)[0, [0, 128, 256]], [0.0, 4.5, 448.0])


def test_wrong_inputs_are_refused_with_how_to_fix_them():
    q = quantize_tiles(jnp.ones((4, 300)), tile=TOKEN)
    with pytest.raises(ValueError, match=r"x of cast_tokens is float16\[4, 4\]; it must be bfloat16 or float32"):
        kernels.cast_tokens(jnp.ones((4, 4), jnp.float16))
    with pytest.raises(ValueError, match="odd last axis; it must be gate and up side by side"):
        kernels.swiglu_cast(jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"must be a float8_e4m3fn matrix \[M, K\]"):
        kernels.requantize_transposed(QTensor(jnp.ones((4, 300)), q.scales))
    with pytest.raises(ValueError, match=r"q.scales.*float32\[4, 2\]; values \[4, 300\].*float32\[4, 3\]"):
        kernels.requantize_transposed(QTensor(q.values, q.scales[:, :2]))
    for op in OPS:
        with pytest.raises(ValueError, match="'e8m0' is unknown; use 'float32' or 'ue8m0'"):
            getattr(kernels, op)(q if op == "requantize_transposed" else jnp.ones((4, 4)), scale="e8m0")


def test_a_step_and_a_scale_are_told_apart():
    q = kernels.cast_tokens(jnp.asarray(random_matrix(0, 4, 256)))
    assert float(bench.largest_step(q, q)) == 0
    moved = QTensor((q.values.view(jnp.uint8) ^ jnp.uint8(1)).view(q.values.dtype), q.scales)
    assert float(bench.largest_step(moved, q)) == 1
    assert float(bench.largest_step(QTensor(q.values, q.scales * 1.001), q)) == np.inf


def test_bytes_of_a_bench_row():
    rows = {case.op: bench.num_bytes(case) for case in reversed(cases.REAL)}
    assert rows["cast_tokens"] == 4096 * 7168 * 3 + 4096 * 56 * 4
    assert rows["swiglu_cast"] == 8192 * 2048 * 5 + 8192 * 16 * 4
    assert rows["requantize_transposed"] == 2 * 4096 * 7168 + 2 * 4096 * 56 * 4
    assert rows["cast_blocks"] == 7168 * 2048 * 5 + 56 * 16 * 4


@pytest.mark.skipif(dispatch.why_no_pallas() is None, reason="a Hopper GPU is here")
@pytest.mark.parametrize("op", OPS)
def test_the_kernel_without_its_gpu_is_refused_with_what_to_use(op):
    value = on_device(argument(op, random_matrix(0, 128, 2048)))
    with pytest.raises(NotImplementedError, match=rf"{op}.*needs (a Hopper GPU|jax).*leave it None"):
        getattr(kernels, op)(value, implementation="pallas")
