"""Scales and their reciprocals are the quotients that IEEE division gives, whatever the backend divides like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels import scales

MANTISSAS = np.arange(1 << 23, dtype=np.int32)


def with_exponent(exponent: int) -> np.ndarray:
    """All floats whose biased exponent is `exponent`."""
    return (MANTISSAS + np.int32(exponent << 23)).view(np.float32)


@pytest.mark.parametrize("form", ["numpy", "xla"])
@pytest.mark.parametrize("exponent", [114, 253])
def test_all_mantissas(exponent, form):
    amax = with_exponent(exponent)
    expected = amax / np.float32(448)
    scale, reciprocal = (
        (scales.scale_of(amax, "float32"), scales.reciprocal_of(expected))
        if form == "numpy"
        else (jax.jit(lambda a: scales.scale_of(a, "float32"))(amax), jax.jit(scales.reciprocal_of)(expected))
    )
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(reciprocal, np.float32(1) / expected)


@pytest.mark.parametrize("error", [-2, -1, 1, 2])
def test_reciprocal_needs_a_guess_within_two_steps(error):
    exact = scales.reciprocal_of(with_exponent(127)).view(np.int32) - (125 << 23)
    corrected = scales._nearest_reciprocal(MANTISSAS | (1 << 23), exact + np.int32(error))
    np.testing.assert_array_equal(corrected, exact)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_floor_powers_and_bad_numbers(array):
    amax = array(np.array([0, 1e-6, 448, 449, 3e38, np.inf, np.nan], np.float32))
    smallest = np.float32(1e-4) / np.float32(448)
    plain = scales.scale_of(amax, "float32")
    np.testing.assert_array_equal(plain[:3], [smallest, smallest, 1])
    np.testing.assert_array_equal(plain[5:], [np.inf, np.nan])
    power = scales.scale_of(amax, "ue8m0")
    np.testing.assert_array_equal(power, np.float32([2.0**-22, 2.0**-22, 1, 2, 2.0**120, np.inf, np.nan]))
    np.testing.assert_array_equal(
        scales.reciprocal_of(power), np.float32([2.0**22] * 2 + [1, 0.5, 2.0**-120] + [np.nan] * 2)
    )
