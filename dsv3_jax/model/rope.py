"""Rotary position embedding with YaRN, on interleaved pairs."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import MLAConfig, YarnConfig
from dsv3_jax.typing import Array, Float, Int


class RopeTable(NamedTuple):
    """Cosines and sines of every position's angles, float32."""

    cos: Float[Array, "B T R/2"]
    sin: Float[Array, "B T R/2"]


def inverse_frequencies(rope_dim: int, *, theta: float, yarn: YarnConfig | None) -> np.ndarray:
    """Radians a position for each of the rope_dim/2 pairs, float32.

    YaRN divides the slow frequencies by `factor`, leaves the fast ones, and blends linearly between the pair that
    rotates β_fast times within the original context and the one that rotates β_slow times. Bounds are rounded
    outwards, and a blend whose bounds fall outside the pairs is taken as the released code computes it.
    """
    frequencies = 1.0 / theta ** (np.arange(0, rope_dim, 2, dtype=np.float32) / np.float32(rope_dim))
    if yarn is None:
        return frequencies.astype(np.float32)

    def pair_that_rotates(times: float) -> float:
        wavelength_ratio = yarn.original_max_position / (times * 2 * math.pi)
        return rope_dim * math.log(wavelength_ratio) / (2 * math.log(theta))

    low = max(math.floor(pair_that_rotates(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_rotates(yarn.beta_slow)), rope_dim - 1)
    span = high - low or 0.001  # a zero-width blend becomes a step
    fast = 1.0 - np.clip((np.arange(rope_dim // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
    return (frequencies / yarn.factor * (1.0 - fast) + frequencies * fast).astype(np.float32)


def yarn_magnitude(yarn: YarnConfig | None, mscale: float) -> float:
    """0.1·mscale·ln(factor) + 1: how much YaRN sharpens attention (report section 4.3, √t)."""
    return 1.0 if yarn is None or mscale == 0.0 else 0.1 * mscale * math.log(yarn.factor) + 1.0


def softmax_scale(mla: MLAConfig, yarn: YarnConfig | None) -> float:
    """(nope + rope)^-0.5 times the square of YaRN's magnitude: the factor on attention scores."""
    sharpening = 1.0 if yarn is None else yarn_magnitude(yarn, yarn.mscale_all_dim)
    return mla.qk_head_dim**-0.5 * sharpening**2


def rope_table(positions: Int[Array, "B T"], *, rope_dim: int, theta: float, yarn: YarnConfig | None) -> RopeTable:
    """Angles of `positions`; scaled by m(mscale)/m(mscale_all_dim), which is 1 in the released models."""
    frequencies = jnp.asarray(inverse_frequencies(rope_dim, theta=theta, yarn=yarn))
    angles_BTr = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    magnitude = 1.0
    if yarn is not None:
        magnitude = yarn_magnitude(yarn, yarn.mscale) / yarn_magnitude(yarn, yarn.mscale_all_dim)
    return RopeTable(jnp.cos(angles_BTr) * magnitude, jnp.sin(angles_BTr) * magnitude)


def apply_rope(x: Float[Array, "B T *H R"], table: RopeTable) -> Float[Array, "B T *H R"]:
    """Rotates each pair (2i, 2i+1) of the last axis by its position's angle, in float32.

    Pairs are interleaved, as in the released weights; reading halves instead is the classic mistake.
    """
    cos, sin = (jnp.expand_dims(angles, tuple(range(2, x.ndim - 1))) for angles in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
