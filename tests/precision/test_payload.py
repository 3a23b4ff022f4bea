"""What is sent of a token: bytes, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.payload import from_payload, gather, pack, to_payload, unpack
from dsv3_kernels import dequantize_tiles, quantize_tiles, requantize_transposed


def tokens(num: int, dim: int) -> jnp.ndarray:
    rng = np.random.default_rng(num)
    return jnp.asarray((rng.normal(size=(num, dim)) * 10.0 ** rng.integers(-6, 6, (num, 1))).astype(np.float32))


@pytest.mark.parametrize(("num", "dim"), [(1, 1), (97, 160), (5, 1025)])
def test_a_payload_is_the_power_of_two_quantisation_in_bytes(num, dim):
    x = tokens(num, dim)
    q = quantize_tiles(x, tile=(1, 128), scale="ue8m0")
    payload = to_payload(x)
    assert payload.values.dtype == payload.exponents.dtype == jnp.uint8
    assert sum(part.nbytes for part in payload) == num * (dim + -(-dim // 128))
    back = unpack(payload)
    np.testing.assert_array_equal(back.scales, q.scales)
    np.testing.assert_array_equal(np.asarray(back.values, np.float32), np.asarray(q.values, np.float32))
    np.testing.assert_array_equal(from_payload(payload), dequantize_tiles(q, tile=(1, 128)))
    for ours, given in zip(pack(back), payload, strict=True):
        np.testing.assert_array_equal(ours, given)


def test_rows_are_gathered_and_padding_is_zero():
    payload = to_payload(tokens(6, 200))
    rows = from_payload(gather(payload, jnp.array([5, 0, 6, 5], jnp.int32)))
    np.testing.assert_array_equal(rows[jnp.array([0, 1, 3])], from_payload(payload)[jnp.array([5, 0, 5])])
    assert not np.asarray(rows[2]).any()


def test_powers_of_two_make_the_turn_to_token_tiles_exact():
    """The reason for them: within a factor of 2^6 between scales, turning a tile rounds nothing a second time."""
    rng = np.random.default_rng(3)
    x = jnp.asarray((rng.uniform(1, 2, (128, 128)) * 2.0 ** rng.integers(0, 6, (128, 1))).astype(np.float32))
    rows = quantize_tiles(x, tile=(1, 128), scale="ue8m0")
    turned = requantize_transposed(rows, scale="ue8m0")
    np.testing.assert_array_equal(dequantize_tiles(turned, tile=(1, 128)).T, dequantize_tiles(rows, tile=(1, 128)))
    rounded = requantize_transposed(quantize_tiles(x, tile=(1, 128)))
    assert (np.asarray(dequantize_tiles(rounded, tile=(1, 128)).T) != np.asarray(x)).any()
