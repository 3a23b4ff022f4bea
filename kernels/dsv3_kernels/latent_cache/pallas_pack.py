"""FP8 rows of the latent cache in the registers of a Hopper kernel, with the bytes of `fp8_rows`.

A quotient is rounded to E4M3 as if it had been divided exactly, without a division: with numerator and divisor of 8
bits each (bfloat16) it is either halfway between two E4M3 values or 2^-13 of its size away from all such points. So a
product by the reciprocal, 2^-23 off, is rounded to 16 bits first, which restores the ties and moves nothing across.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.casts.pallas_rounding import to_e4m3
from dsv3_kernels.latent_cache.fp8_rows import UE8M0_SCALE_FLOOR
from dsv3_kernels.scales import reciprocal_of, scale_of

_MANTISSA, _INFINITY = 0x7FFFFF, 0x7F800000


def quantize_tile(x: jax.Array, scale: str, layout: Any) -> tuple[jax.Array, jax.Array]:
    """E4M3 bytes of bfloat16 [rows, units, columns], which is a tile a row, and float32 scales [rows]."""
    numbers = x.astype(jnp.float32)
    scales = tile_scales(jnp.max(jnp.max(jnp.abs(numbers), axis=2), axis=1), scale)
    reciprocals = jnp.where(scales == jnp.inf, jnp.float32(0), reciprocal_of(scales))
    values = to_e4m3(quotients(numbers, across(reciprocals, x.shape, [0], layout)))
    return lax.bitcast_convert_type(values, jnp.uint8), scales


def tile_scales(amax: jax.Array, scale: str) -> jax.Array:
    """Scales of tiles of bfloat16 whose largest magnitudes are `amax`, as `pack_fp8_cache_rows` has them."""
    scales = scale_of(amax, "float32")
    if scale == "float32":
        return scales.astype(jnp.bfloat16).astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.maximum(scales, jnp.float32(UE8M0_SCALE_FLOOR)), jnp.int32)
    powers = lax.bitcast_convert_type((bits + _MANTISSA) & _INFINITY, jnp.float32)
    return jnp.where(jnp.abs(scales) < jnp.inf, powers, scales)


def quotients(x: jax.Array, reciprocals: jax.Array) -> jax.Array:
    """x / scale in as many bits as E4M3 needs: see above."""
    products = x * reciprocals
    bits = (lax.bitcast_convert_type(products, jnp.int32) + 0x80) & ~0xFF
    return jnp.where(products == products, lax.bitcast_convert_type(bits, jnp.float32), products)


def word_of(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Two bfloat16 as they lie in memory one after the other."""
    low, high = (lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) for x in (even, odd))
    return (low & 0xFFFF) | (high << 16)


def bytes_of(words: Sequence[jax.Array], layout: Any) -> jax.Array:
    """Four arrays of int32 [...] as uint8 [..., 16], little-endian, in `layout`."""
    shape = (*words[0].shape, 16)
    byte = _columns(shape, layout)
    word = _chosen([across(each, shape, range(len(shape) - 1), layout) for each in words], byte >> 2)
    return ((word >> ((byte & 3) << 3)) & 0xFF).astype(jnp.uint8)


def side_by_side(arrays: Sequence[jax.Array], layout: Any) -> jax.Array:
    """As many arrays [...] as the columns of one [..., columns] in `layout`."""
    shape = (*arrays[0].shape, len(arrays))
    return _chosen(
        [across(each, shape, range(len(shape) - 1), layout) for each in arrays],
        _columns(shape, layout),
    )


def across(x: jax.Array, shape: Sequence[int], axes: Sequence[int], layout: Any) -> jax.Array:
    """x repeated over the axes of `shape` that are not its own, in `layout`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)


def _columns(shape: Sequence[int], layout: Any) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, len(shape) - 1, layout=layout)


def _chosen(values: Sequence[jax.Array], which: jax.Array) -> jax.Array:
    chosen = values[0]
    for index, value in enumerate(values[1:], 1):
        chosen = jnp.where(which == index, value, chosen)
    return chosen
