"""The scale of a tile and its reciprocal, to the last bit the same on every backend.

Division of floats is not: XLA rewrites x / 448 as x * (1 / 448) and 1 / (x / 448) as 448 / x, and on NVIDIA GPUs both
it and Mosaic divide approximately (div.full, rcp.approx: one or two steps off). So the quotients are rounded to the
nearest with integers: 448 = 7 * 2^6 leaves a division by 7, and a reciprocal is corrected by its remainder. The
functions take NumPy arrays, JAX arrays and the values inside a Pallas kernel.
"""

from typing import Any

import numpy as np
from jax import lax

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""A tile's largest magnitude counts as at least this, so that a tile of zeros has a scale."""

_FLOOR_BITS = int(np.float32(AMAX_FLOOR).view(np.int32))
_MANTISSA, _ONE, _INFINITY, _NAN = 0x7FFFFF, 0x3F800000, 0x7F800000, 0x7FC00000


def scale_of(amax: Any, scale: str) -> Any:
    """max(amax, 1e-4) / 448 rounded to the nearest float32; not finite if `amax` is not.

    Args:
        amax: the largest magnitudes, float32, none negative.
        scale: "float32", or "ue8m0" for the power of two at or above it.
    """
    xp = amax.__array_namespace__()
    bits = xp.maximum(_bits(amax), _FLOOR_BITS)  # of positive floats the order of bits is theirs, NaN on top
    mantissa = (bits & _MANTISSA) | (_MANTISSA + 1)
    shift = xp.where(mantissa < 7 << 21, np.int32(3), np.int32(2))  # so that the quotient has 24 bits
    quotient = _divide((mantissa << shift) + 3, 7)
    quotient = (((bits >> 23) - 7 - shift) << 23) + quotient
    if scale == "ue8m0":
        quotient = (quotient + _MANTISSA) & _INFINITY  # carries into the exponent unless the mantissa is zero
    return _float(xp.where(bits < _INFINITY, quotient, bits))


def reciprocal_of(scales: Any) -> Any:
    """1 / scale rounded to the nearest float32, of scales that `scale_of` makes; NaN if the scale is not finite."""
    xp = scales.__array_namespace__()
    bits = _bits(scales)
    mantissa = (bits & _MANTISSA) | (_MANTISSA + 1)
    nearly = np.float32(1) / _float((bits & _MANTISSA) | _ONE)  # of [1, 2), so in (1/2, 1]
    reciprocal = _nearest_reciprocal(mantissa, _bits(nearly) - (125 << 23))
    return _float(xp.where(bits < _INFINITY, reciprocal + ((252 - (bits >> 23)) << 23), _NAN))


def _nearest_reciprocal(mantissa: Any, nearly: Any) -> Any:
    """The integer nearest to 2^47 / mantissa, of a guess that is at most two off.

    The remainder 2^47 - mantissa * guess is small, so that its low 32 bits are all of it.
    """
    for _ in range(2):
        twice_remainder = -2 * (mantissa * nearly)
        nearly = nearly + (twice_remainder > mantissa).astype(np.int32) - (twice_remainder < -mantissa).astype(np.int32)
    return nearly


def _divide(n: Any, d: int) -> Any:
    """n // d of integers that are not negative."""
    return n // d if isinstance(n, np.ndarray) else lax.div(n, lax.full_like(n, d))


def _bits(x: Any) -> Any:
    return x.view(np.int32) if isinstance(x, np.ndarray) else lax.bitcast_convert_type(x, np.int32)


def _float(bits: Any) -> Any:
    return bits.view(np.float32) if isinstance(bits, np.ndarray) else lax.bitcast_convert_type(bits, np.float32)
