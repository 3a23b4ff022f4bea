"""E5M6: a sign, five bits of exponent, six of mantissa, with a power-of-two scale for each 128 features of a token.

What the report saves of the input of attention's output projection (section 3.3.3). No hardware has the format: two
elements lie in three bytes, so one takes 1.5 bytes and 4 / 128 for its share of a scale. The bits are those
of float16 without its last four: infinities, NaN and subnormal values included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float, UInt
from dsv3_kernels.derivative import without_gradient

E5M6_MAX = 65024.0
"""(2 - 2^-6) · 2^15"""

TILE = 128


class E5M6Tensor(NamedTuple):
    """[M, A] packed: bytes [M, 3·⌈A/2⌉] and float32 scales [M, ⌈A/128⌉]; multiply to dequantise."""

    packed: UInt[Array, "M X"]
    scales: Float[Array, "M Y"]


def quantize(x: Float[Array, "M A"]) -> E5M6Tensor:
    """Rounds to nearest even; a tile's scale is the least power of two under which its largest element fits."""
    x = without_gradient("e5m6.quantize", x)
    M, A = x.shape
    tiles = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -A % TILE))).reshape(M, -1, TILE)
    scales = _scale_for(jnp.abs(tiles).max(axis=-1))
    scaled = (tiles / scales[:, :, None]).reshape(M, -1)[:, : A + A % 2]
    return E5M6Tensor(_pack(encode(scaled)), scales)


def dequantize(q: E5M6Tensor, *, num_columns: int) -> Float[Array, "M A"]:
    """Float32."""
    elements = decode(_unpack(q.packed))[:, :num_columns]
    return elements * jnp.repeat(q.scales, TILE, axis=1)[:, :num_columns]


def encode(x: Float[Array, "*batch"]) -> UInt[Array, "*batch"]:
    """The 12 bits of each float32, as uint16, rounded to nearest even; what is beyond the largest becomes infinite."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = (bits >> 31) << 11
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    rounded = (magnitude + jnp.uint32(0xFFFF) + ((magnitude >> 17) & 1)) >> 17
    normal = jnp.minimum(rounded - jnp.minimum(rounded, jnp.uint32((127 - 15) << 6)), jnp.uint32(31 << 6))
    small = jnp.abs(x) < jnp.float32(2.0**-14)
    subnormal = jnp.round(jnp.where(small, jnp.abs(x), 0.0) * jnp.float32(2.0**20)).astype(jnp.uint32)
    number = jnp.where(small, subnormal, normal)
    number = jnp.where(magnitude > jnp.uint32(0x7F800000), jnp.uint32((31 << 6) | 32), number)
    return (sign | number).astype(jnp.uint16)


def decode(codes: UInt[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The float32 that each 12-bit code stands for."""
    return jax.lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)


def _scale_for(amax: Float[Array, "M Y"]) -> Float[Array, "M Y"]:
    """The least power of two s with amax ≤ s·E5M6_MAX, and not below 2^-100, which is what zeros get."""
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    is_beyond = bits & 0x7FFFFF > 0x7E0000  # the mantissa of E5M6_MAX = 1.984375 · 2^15
    exponent = (bits >> 23) - 15 + is_beyond.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.maximum(exponent, 127 - 100) << 23, jnp.float32)


def _pack(codes: UInt[Array, "M A"]) -> UInt[Array, "M X"]:
    """Two elements of 12 bits in three bytes."""
    first, second = codes[:, 0::2], codes[:, 1::2]
    parts = [first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4]
    return jnp.stack(parts, axis=-1).reshape(codes.shape[0], -1).astype(jnp.uint8)


def _unpack(packed: UInt[Array, "M X"]) -> UInt[Array, "M A"]:
    low, middle, high = jnp.moveaxis(packed.astype(jnp.uint16).reshape(packed.shape[0], -1, 3), -1, 0)
    pair = [low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)]
    return jnp.stack(pair, axis=-1).reshape(packed.shape[0], -1)
