"""What is sent of a token: bytes, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.gradient_tiles import gradient_rows
from dsv3_jax.precision.wire import (
    Payload,
    from_payload,
    gather,
    gather_payload,
    pack,
    sum_payload_rows,
    to_payload,
    unpack,
)
from dsv3_kernels import BlockPlan, cast_tokens, dequantize_tiles, quantize_tiles, requantize_transposed

PLAN = BlockPlan(
    slot_of=jnp.array([[7, 1], [4, 8], [0, 5], [8, 2], [8, 8]], jnp.int32),
    token_of=jnp.array([2, 0, 3, 5, 1, 2, 5, 0], jnp.int32),
    pair_of=jnp.array([4, 1, 7, 10, 2, 5, 10, 0], jnp.int32),
    block_expert=jnp.array([0, 1], jnp.int32),
)
"""Of five tokens with two choices among eight rows: rows 3 and 6 are padding, token 1 has one row, token 4 none."""


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


@pytest.mark.slow
def test_where_the_bytes_were_exchanged_changes_no_row():
    """Tokens of two devices, each quantised at home, put together where their experts are."""
    x = tokens(5, 200).astype(jnp.bfloat16)
    here, there = to_payload(x[:2]), to_payload(x[2:])
    arrived = Payload(*(jnp.concatenate(parts) for parts in zip(here, there, strict=True)))
    rows = jax.jit(gather_payload)(x, PLAN)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(from_payload(gather(arrived, PLAN.token_of), dtype=jnp.bfloat16), rows)
    np.testing.assert_array_equal(rows[4], from_payload(to_payload(x))[1])  # bfloat16 holds what was sent
    assert not np.asarray(rows[jnp.array([3, 6])], np.float32).any()


def test_gradients_go_the_other_way_as_bytes_and_sums():
    """Out in bytes and home in sums; then out in sums and home in bytes. A token without rows gets zeros."""
    x, d_rows = tokens(5, 200).astype(jnp.bfloat16), tokens(8, 200).astype(jnp.bfloat16)
    wide = np.asarray(d_rows, np.float32)
    sums = np.stack([wide[7] + wide[1], wide[4], wide[0] + wide[5], wide[2], 0 * wide[0]]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(sum_payload_rows(d_rows, PLAN), sums)
    np.testing.assert_array_equal(jax.vjp(lambda x: gather_payload(x, PLAN), x)[1](d_rows)[0], sums)

    d_out = x * jnp.bfloat16(1e-7)  # below the floor of the quantiser, but for which gradients are lifted
    sent = dequantize_tiles(gradient_rows(d_out, tile=(1, 128), scale="ue8m0"), tile=(1, 128))
    given = np.concatenate([sent, np.zeros((1, 200), np.float32)])[PLAN.token_of]
    np.testing.assert_array_equal(jax.vjp(lambda rows: sum_payload_rows(rows, PLAN), d_rows)[1](d_out)[0], given)


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)])
def test_rows_that_came_through_the_wire_are_quantised_again_without_loss(tile):
    """Also where a tile's largest element was rounded to half of the range, in zeros, and below the floor."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(160, 384)) * 10.0 ** rng.integers(-9, 9, (160, 3)).repeat(128, axis=1)
    x[:6, :128] = np.array([230.0, 226.0, 232.0, 225.0, 448.0, 0.0])[:, None] * 2.0 ** rng.integers(-20, 1, (6, 128))
    x = jnp.asarray(x, jnp.bfloat16)
    if tile == (1, 128):
        sent = unpack(to_payload(x))
        again = cast_tokens(from_payload(pack(sent), dtype=jnp.bfloat16), scale="ue8m0")
        assert (np.asarray(again.scales)[:4, 0] * 2 == np.asarray(sent.scales)[:4, 0]).all()
    else:  # the control's gradients, whose scales are far too large for most rows
        sent = gradient_rows(x, tile=tile, scale="ue8m0")
        again = gradient_rows(from_payload(pack(sent), dtype=jnp.bfloat16), tile=(1, 128), scale="ue8m0")
    assert (np.asarray(again.scales) <= np.asarray(sent.scales)).all()
    np.testing.assert_array_equal(dequantize_tiles(again, tile=(1, 128)), dequantize_tiles(sent, tile=(1, 128)))


def test_powers_of_two_make_the_transposition_to_token_tiles_exact():
    """The reason for them: within a factor of 2^6 between scales, transposing a tile rounds nothing a second time."""
    rng = np.random.default_rng(3)
    x = jnp.asarray((rng.uniform(1, 2, (128, 128)) * 2.0 ** rng.integers(0, 6, (128, 1))).astype(np.float32))
    rows = quantize_tiles(x, tile=(1, 128), scale="ue8m0")
    transposed = requantize_transposed(rows, scale="ue8m0")
    np.testing.assert_array_equal(dequantize_tiles(transposed, tile=(1, 128)).T, dequantize_tiles(rows, tile=(1, 128)))
    rounded = requantize_transposed(quantize_tiles(x, tile=(1, 128)))
    assert (np.asarray(dequantize_tiles(rounded, tile=(1, 128)).T) != np.asarray(x)).any()
