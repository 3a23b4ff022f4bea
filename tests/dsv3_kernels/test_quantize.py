"""The tile quantiser against DeepSeek's own values, and its two implementations against each other."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv3_kernels.quantize import QTensor, dequantize_tiles, quantize_tiles

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fp8_gate.npz")
CASES = {"per_token": ("x_bf16", (1, 128)), "per_block": ("w_bf16", (128, 128)), "per_channel": ("c_bf16", (128, 1))}


def golden_input(name: str) -> np.ndarray:
    return GOLDEN[name].view(ml_dtypes.bfloat16)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["numpy", "jax", "jit"])
def test_golden_bit_for_bit(case, scale, form):
    name, tile = CASES[case]
    x = golden_input(name)
    quantize = functools.partial(quantize_tiles, tile=tile, scale=scale)
    q = {"numpy": lambda: quantize(x), "jax": lambda: quantize(jnp.asarray(x)), "jit": lambda: jax.jit(quantize)(x)}[
        form
    ]()
    key = f"{case}_{'f32' if scale == 'float32' else 'ue8m0'}"
    np.testing.assert_array_equal(np.asarray(q.scales), GOLDEN[f"{key}/sf"])
    np.testing.assert_array_equal(bits(q.values), GOLDEN[f"{key}/q"])


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
def test_division_instead_of_reciprocal_differs_by_one_step_at_most(scale):
    q = quantize_tiles(golden_input("x_bf16"), tile=(1, 128), scale=scale)
    key = f"v3_act_quant_{'f32' if scale == 'float32' else 'ue8m0'}"
    np.testing.assert_array_equal(q.scales, GOLDEN[f"{key}/sf"])
    steps = np.abs(bits(q.values).astype(int) - GOLDEN[f"{key}/q"].astype(int))
    assert steps.max() <= 1
    assert (steps > 0).sum() <= (1 if scale == "float32" else 0)


def test_gemm_operands_of_the_golden():
    for operand, tile in (("a", (1, 128)), ("b", (128, 128))):
        q = quantize_tiles(golden_input(f"gemm/{operand}_bf16"), tile=tile)
        np.testing.assert_array_equal(q.scales, GOLDEN[f"gemm/{operand}sf"])
        np.testing.assert_array_equal(bits(q.values), GOLDEN[f"gemm/{operand}q"])


matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(x=matrices, tile=st.tuples(st.integers(1, 5), st.integers(1, 5)))
@settings(max_examples=300, deadline=None)
def test_quantising_what_was_dequantised_changes_nothing(x, tile):
    q = quantize_tiles(x, tile=tile)
    again = quantize_tiles(dequantize_tiles(q, tile=tile), tile=tile)
    np.testing.assert_array_equal(again.scales, q.scales)
    np.testing.assert_array_equal(bits(again.values), bits(q.values))


@pytest.mark.parametrize("start", range(4))
def test_scale_survives_for_every_mantissa(start):
    """All 2^23 mantissas of an amax: the claim fl(fl(448 s) / 448) = s for s = fl(a / 448), in full."""
    amax = (np.arange(start, 1 << 23, 4, dtype=np.int32) + np.int32(127 << 23)).view(np.float32)
    scale = amax / np.float32(448)
    np.testing.assert_array_equal(scale * np.float32(448) / np.float32(448), scale)


@given(x=matrices, tile=st.tuples(st.integers(1, 5), st.integers(1, 5)))
@settings(max_examples=100, deadline=None)
def test_error_is_within_half_a_step_and_largest_value_is_kept(x, tile):
    deq = dequantize_tiles(quantize_tiles(x, tile=tile), tile=tile)
    padded = np.abs(np.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % tile[0]), (0, -x.shape[-1] % tile[1])]))
    blocks = padded.reshape(*x.shape[:-2], -(-x.shape[-2] // tile[0]), tile[0], -(-x.shape[-1] // tile[1]), tile[1])
    amax = np.maximum(blocks.max((-3, -1)), 1e-4)
    full = np.repeat(np.repeat(amax, tile[0], -2), tile[1], -1)[..., : x.shape[-2], : x.shape[-1]]
    assert (np.abs(deq - x) <= np.maximum(np.abs(x) * 2.0**-4, full / 448 * 2.0**-10) * 1.001).all()


def test_zero_tile_has_a_scale_and_stays_zero():
    q = quantize_tiles(np.zeros((3, 130), np.float32), tile=(128, 128))
    np.testing.assert_array_equal(q.scales, np.full((1, 2), np.float32(1e-4) / np.float32(448)))
    assert not q.values.astype(np.float32).any()


def test_ue8m0_scales_are_powers_of_two_that_never_clip():
    x = np.random.default_rng(0).normal(size=(7, 300)).astype(np.float32)
    q = quantize_tiles(x, tile=(1, 128), scale="ue8m0")
    assert (np.frexp(q.scales)[0] == 0.5).all()
    plain = quantize_tiles(x, tile=(1, 128))
    assert (q.scales >= plain.scales).all()
    assert (q.scales < 2 * plain.scales).all()


@pytest.mark.parametrize("scale", ["float32", "ue8m0"])
@pytest.mark.parametrize("form", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
def test_non_finite_input_shows_in_the_scale(tile, form, scale):
    x = np.ones((16, 512), np.float32)
    x[3, 5], x[3, 200] = np.nan, np.inf
    scales = np.asarray(quantize_tiles(form(x), tile=tile, scale=scale).scales)
    row = 3 // tile[0]
    assert np.isnan(scales[row, 0])
    assert np.isinf(scales[row, 1])
    assert np.isfinite(scales).sum() == scales.size - 2


def test_refuses_scales_of_another_tile_size():
    with pytest.raises(ValueError, match=r"scales \(2, 3\).*expected \(4, 5\)"):
        dequantize_tiles(
            QTensor(np.zeros((200, 320), ml_dtypes.float8_e4m3fn), np.ones((2, 3), np.float32)), tile=(64, 64)
        )
    with pytest.raises(ValueError, match="unknown"):
        quantize_tiles(np.zeros((2, 2), np.float32), tile=(1, 1), scale="e8m0")
    with pytest.raises(ValueError, match="positive"):
        quantize_tiles(np.zeros((2, 2), np.float32), tile=(0, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "quantize_tiles(np.ones(5, np.float32), tile=(1, 128))",
            "x is float32[5]; it must be of a float type with two",
        ),
        ("quantize_tiles(np.ones((2, 5), np.int32), tile=(1, 128))", "x is int32[2, 5]; it must be of a float type"),
        ("quantize_tiles(np.ones((2, 5), np.float32), tile=(128,))", "tile=(128,) must be two positive numbers"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(call, message, repository):
    """In a process of its own: here the signature's check would come first."""
    program = f"import numpy as np; from dsv3_kernels import quantize_tiles; {call}"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(repository / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"ValueError: {message}" in result.stderr
