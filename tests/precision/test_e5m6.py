"""E5M6 against a search for the nearest of all its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.e5m6 import E5M6_MAX, decode, dequantize, encode, quantize

CODES = np.arange(4096, dtype=np.uint16)


def value_of(code: int) -> float:
    """By the definition: sign, exponent with bias 15, six bits of mantissa."""
    sign, exponent, mantissa = code >> 11, (code >> 6) & 31, code & 63
    if exponent == 31:
        return float("nan") if mantissa else (-1) ** sign * float("inf")
    size = mantissa * 2.0**-20 if exponent == 0 else (1 + mantissa / 64) * 2.0 ** (exponent - 15)
    return (-1) ** sign * size


FINITE = np.array([value_of(code) for code in range(31 << 6)])
"""All finite values from zero up, by code."""


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest finite number to each |x| ≤ E5M6_MAX; of two, the one with an even code."""
    size = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(FINITE, size), 1, len(FINITE) - 1)
    down, up = size - FINITE[above - 1], FINITE[above] - size
    is_up = (up < down) | ((up == down) & (above % 2 == 0))
    return np.copysign(FINITE[np.where(is_up, above, above - 1)], x)


def test_every_code_decodes_by_the_definition_and_encodes_to_itself():
    numbers = np.asarray(decode(jnp.asarray(CODES)))
    np.testing.assert_array_equal(numbers, [value_of(int(code)) for code in CODES])
    is_number = ~np.isnan(numbers)
    np.testing.assert_array_equal(np.asarray(encode(jnp.asarray(numbers)))[is_number], CODES[is_number])
    assert value_of((31 << 6) - 1) == E5M6_MAX


def test_rounding_is_to_the_nearest_and_ties_to_even():
    rng = np.random.default_rng(0)
    halfway = (FINITE[1:] + FINITE[:-1]) / 2
    wide = rng.normal(size=20_000) * 2.0 ** rng.integers(-24, 15, 20_000)
    x = np.concatenate([wide, halfway, np.nextafter(halfway, 0), np.nextafter(halfway, 1e9), FINITE, [2**-40, 0.0]])
    x = np.concatenate([x, -x]).astype(np.float32)
    x = x[np.abs(x) <= E5M6_MAX]
    np.testing.assert_array_equal(np.asarray(decode(encode(jnp.asarray(x)))), nearest(x))


def test_what_is_beyond_the_largest_is_infinite_and_nan_stays_nan():
    x = jnp.array([65024.0, 65279.9, 65280.0, 1e38, jnp.inf, -jnp.inf, jnp.nan, -1e9], jnp.float32)
    np.testing.assert_array_equal(decode(encode(x)), [65024, 65024, np.inf, np.inf, np.inf, -np.inf, np.nan, -np.inf])


@pytest.mark.parametrize("shape", [(1, 1), (3, 97), (2, 128), (5, 257), (7, 300)])
def test_a_tensor_comes_back_within_half_a_step(shape):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-12, 12, (shape[0], 1))).astype(np.float32)
    q = jax.jit(quantize)(jnp.asarray(x))
    assert q.packed.dtype == jnp.uint8
    assert q.packed.shape == (shape[0], 3 * -(-shape[1] // 2))
    assert q.scales.shape == (shape[0], -(-shape[1] // 128))
    back = np.asarray(dequantize(q, num_columns=shape[1]))
    exponents = np.log2(np.asarray(q.scales))
    np.testing.assert_array_equal(exponents, np.round(exponents))
    scale = np.repeat(np.asarray(q.scales), 128, axis=1)[:, : shape[1]]
    np.testing.assert_array_equal(back, nearest(x / scale) * scale)
    assert (np.abs(back - x) <= np.maximum(np.abs(x) / 128, scale * 2.0**-21)).all()


def test_the_largest_of_a_tile_fits_and_no_smaller_scale_would_do():
    for amax in (65024.0, 65025.0, 1.0, 1.984375, 1.9844, 3e38, 1e-25):
        x = jnp.full((1, 2), amax, jnp.float32)
        q = quantize(x)
        scale = float(q.scales[0, 0])
        assert amax / scale <= E5M6_MAX < 2 * amax / scale, amax
    assert not np.asarray(dequantize(quantize(jnp.zeros((2, 5))), num_columns=5)).any()


def test_a_bad_number_stays_in_its_tile():
    x = np.ones((3, 256), np.float32)
    x[1, 5], x[2, 200] = np.nan, -np.inf
    back = np.asarray(dequantize(quantize(jnp.asarray(x)), num_columns=256))
    assert np.isnan(back[1, 5])
    assert back[2, 200] == -np.inf
    assert (back[0] == 1).all()
    assert (back[1, 128:] == 1).all()
    assert (back[2, :128] == 1).all()
