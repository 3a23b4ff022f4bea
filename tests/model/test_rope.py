"""Rotary embedding as multiplication of complex numbers, YaRN against DeepSeek's own tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config.model import MLAConfig, YarnConfig
from dsv3_jax.model.rope import apply_rope, inverse_frequencies, rope_table, softmax_scale

YARN = YarnConfig(factor=4.0, original_max_position=16)


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Pairs (2i, 2i+1) as complex numbers, times exp(i·angle), in float64. x [B, T, ..., R]."""
    pairs = x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2].astype(np.float64)
    angle = positions[..., None].astype(np.float64) * frequencies
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    out = pairs * np.exp(1j * angle)
    return np.stack([out.real, out.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 6), (3, 5, 4, 10)], ids=str)
def test_rope_multiplies_complex_numbers(shape, yarn) -> None:
    rng = np.random.default_rng(len(shape))
    x, positions = rng.normal(0, 1, shape).astype(np.float32), rng.integers(0, 500, shape[:2])
    table = rope_table(jnp.asarray(positions), rope_dim=shape[-1], theta=10000.0, yarn=yarn)
    frequencies = inverse_frequencies(shape[-1], theta=10000.0, yarn=yarn).astype(np.float64)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), table), turned(x, positions, frequencies), atol=2e-4)


@pytest.mark.parametrize("length", [4096, 16384, 163840])
def test_frequencies_and_scale_equal_the_official_ones(golden, length: int) -> None:
    data = np.load(golden / "fp8_gate.npz")
    yarn = YarnConfig() if length > 4096 else None
    frequencies = inverse_frequencies(64, theta=10000.0, yarn=yarn)
    np.testing.assert_allclose(frequencies, data[f"rope/{length}/inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(softmax_scale(MLAConfig(), yarn), data[f"rope/{length}/softmax_scale"], rtol=1e-12)


_rotate = jax.jit(
    lambda x, positions: apply_rope(x, rope_table(positions, rope_dim=6, theta=10000.0, yarn=YARN)),
)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), shift=st.integers(0, 1000))
def test_scores_depend_on_distance_only_and_length_is_kept(seed: int, shift: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(0, 1, (2, 1, 4, 6)).astype(np.float32)
    at = rng.integers(0, 50, (2, 1, 4))

    def scores(offset: int) -> np.ndarray:
        return np.asarray(_rotate(q, at[0] + offset) * _rotate(k, at[1] + offset)).sum(-1)

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(_rotate(q, at[0]), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)


def test_position_zero_turns_nothing_and_pairs_are_neighbours() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (1, 1, 8)), jnp.float32)
    np.testing.assert_allclose(_at(x, 0), x, atol=1e-7)
    first_pair = jnp.asarray([[[1.0, 0.0, 0, 0, 0, 0, 0, 0]]])
    expected = [math.cos(3.0), math.sin(3.0), 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(_at(first_pair, 3)[0, 0], expected, atol=1e-6)


def _at(x, position: int):
    table = rope_table(jnp.full((1, 1), position), rope_dim=8, theta=10000.0, yarn=None)
    return apply_rope(x, table)


def test_the_last_position_of_the_released_model_is_still_accurate() -> None:
    positions = jnp.asarray([[163839]])
    table = rope_table(positions, rope_dim=64, theta=10000.0, yarn=YarnConfig())
    angles = 163839 * inverse_frequencies(64, theta=10000.0, yarn=YarnConfig()).astype(np.float64)
    # an angle of 1.6e5 has a spacing of 0.016 in float32, and so have all implementations
    np.testing.assert_allclose(table.cos[0, 0], np.cos(angles), atol=0.016)
    np.testing.assert_allclose(table.cos[0, 0, 8:], np.cos(angles[8:]), atol=2e-3)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain = inverse_frequencies(64, theta=10000.0, yarn=None)
    ratio = plain / inverse_frequencies(64, theta=10000.0, yarn=YarnConfig())
    np.testing.assert_allclose(ratio[:10], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-8:], 40.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-5).all()


@pytest.mark.parametrize(
    ("yarn", "theta", "ratios"),
    [
        # Kimi-K2: pair 19.2 turns once in 4096 positions, so the step lies between pairs 19 and 20
        (YarnConfig(factor=32.0, beta_fast=1.0), 50000.0, [1.0] * 20 + [32.0] * 12),
        # a pair that rotates exactly once is the last one whose frequency stays
        (YarnConfig(factor=8.0, original_max_position=1000, beta_fast=500 / math.pi, beta_slow=500 / math.pi), 2.0,
         [1.0] + [8.0] * 31),
        # no pair turns so often or so seldom: all on one side, as the released code has it
        (YarnConfig(factor=8.0, original_max_position=10**12), 10.0, [8.0] * 32),
        (YarnConfig(factor=8.0, original_max_position=1), 10.0, [1.0] * 32),
    ],
    ids=["kimi_k2", "whole_pair", "all_slow", "all_fast"],
)  # fmt: skip
def test_equal_or_distant_bounds_of_yarn_make_a_step(yarn, theta, ratios) -> None:
    plain = inverse_frequencies(64, theta=theta, yarn=None)
    np.testing.assert_allclose(plain / inverse_frequencies(64, theta=theta, yarn=yarn), ratios, rtol=1e-5)


def test_both_magnitudes_of_yarn() -> None:
    """mscale/mscale_all_dim is on cosines and sines; mscale_all_dim squared is on the scores."""
    yarn = YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.5)
    table = rope_table(jnp.asarray([[0]]), rope_dim=6, theta=10000.0, yarn=yarn)
    log = 0.1 * math.log(40)
    np.testing.assert_allclose(table.cos, (0.707 * log + 1) / (0.5 * log + 1), rtol=1e-6)
    assert softmax_scale(MLAConfig(), yarn) == pytest.approx(192**-0.5 * (0.5 * log + 1) ** 2)
    assert softmax_scale(MLAConfig(), None) == pytest.approx(192**-0.5)
    none = YarnConfig(mscale=0.0, mscale_all_dim=0.0)
    assert softmax_scale(MLAConfig(), none) == pytest.approx(192**-0.5)


def test_rope_of_bfloat16_turns_in_float32() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(0, 1, (2, 5, 3, 6)), jnp.bfloat16)
    positions = np.arange(10).reshape(2, 5) * 7
    table = rope_table(jnp.asarray(positions), rope_dim=6, theta=10000.0, yarn=None)
    out = apply_rope(x, table)
    assert out.dtype == jnp.bfloat16
    expected = turned(np.asarray(x, np.float32), positions, inverse_frequencies(6, theta=10000.0, yarn=None))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2**-7)
