"""The FP8 row of the latent cache: 656 bytes a token, as FlashMLA stores it.

Bytes 0..511 hold the latent in E4M3, 512..527 four float32 scales (one for each 128 columns), 528..655 the 64 rotary
values in BF16, all little-endian. Functions take NumPy arrays and give NumPy arrays, or JAX arrays and give JAX arrays.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, UInt8

from dsv3_kernels.derivative import without_gradient
from dsv3_kernels.quantize import E4M3, QTensor, dequantize_tiles
from dsv3_kernels.scales import AMAX_FLOOR, E4M3_MAX

LATENT_DIM = 512
ROPE_DIM = 64
TILE = 128
"""Columns of the latent that share one scale."""

NUM_SCALES = LATENT_DIM // TILE
ROPE_BYTE = LATENT_DIM + 4 * NUM_SCALES
ROW_BYTES = ROPE_BYTE + 2 * ROPE_DIM
UE8M0_SCALE_FLOOR = 1e-4

BF16 = np.dtype(ml_dtypes.bfloat16)
UINT8 = np.dtype(np.uint8)


def pack_fp8_cache_rows(
    latent: Float[Array | np.ndarray, "*batch 512"],
    rope: Float[Array | np.ndarray, "*batch 64"],
    *,
    scale: str = "float32",
) -> UInt8[Array | np.ndarray, "*batch 656"]:
    """Rows of the FP8 cache; the latent is quantised in tiles of 128, the rotary part is rounded to BF16.

    As FlashMLA's own packer: scale = max(amax, 1e-4) / 448 rounded to the latent's dtype, values = latent / scale. With
    "ue8m0" the scale is the next power of two at or above max(amax / 448, 1e-4), still stored as float32.

    Raises: ValueError for an unknown `scale`.
    """
    if scale not in ("float32", "ue8m0"):
        raise ValueError(f"scale={scale!r} is unknown; use 'float32' or 'ue8m0'.")
    latent, rope = without_gradient("pack_fp8_cache_rows", (latent, rope))
    xp = latent.__array_namespace__()
    tiles = latent.astype(np.float32).reshape(*latent.shape[:-1], NUM_SCALES, TILE)
    # Magnitudes in the order of their bits: XLA's maximum of floats may lose a NaN.
    amax = (tiles.view(np.int32) & np.int32(0x7FFFFFFF)).max(axis=-1).view(np.float32)
    amax = xp.where(amax < np.float32(AMAX_FLOOR), np.float32(AMAX_FLOOR), amax)
    scales = amax / _opaque(xp.full_like(amax, E4M3_MAX))
    if scale == "ue8m0":
        scales = _power_of_two_at_or_above(
            xp.where(scales < np.float32(UE8M0_SCALE_FLOOR), np.float32(UE8M0_SCALE_FLOOR), scales)
        )
    else:
        scales = scales.astype(latent.dtype).astype(np.float32)
    with np.errstate(invalid="ignore"):  # inf / inf: the scale tells
        scaled = tiles / _opaque(xp.broadcast_to(scales[..., None], tiles.shape))
    values = xp.clip(scaled, np.float32(-E4M3_MAX), np.float32(E4M3_MAX)).astype(E4M3)
    parts = [values.reshape(latent.shape), scales, rope.astype(BF16)]
    return xp.concatenate([_to_bytes(part) for part in parts], axis=-1)


def unpack_fp8_cache_rows(
    rows: UInt8[Array | np.ndarray, "*batch 656"],
) -> tuple[BFloat16[Array | np.ndarray, "*batch 512"], BFloat16[Array | np.ndarray, "*batch 64"]]:
    """The latent, dequantised in float32 and rounded to BF16, and the rotary part."""
    values, scales, rope = split_fp8_cache_rows(rows)
    q = QTensor(values[..., None, :], scales[..., None, :])
    with np.errstate(invalid="ignore"):  # 0 times an infinite scale
        return dequantize_tiles(q, tile=(1, TILE), dtype=BF16)[..., 0, :], rope


def split_fp8_cache_rows(
    rows: UInt8[Array | np.ndarray, "*batch 656"],
) -> tuple[Any, Float32[Array | np.ndarray, "*batch 4"], BFloat16[Array | np.ndarray, "*batch 64"]]:
    """The parts as they are stored: E4M3 values [..., 512], float32 scales [..., 4], BF16 rotary part [..., 64]."""
    return (
        _from_bytes(rows[..., :LATENT_DIM], E4M3),
        _from_bytes(rows[..., LATENT_DIM:ROPE_BYTE], np.dtype(np.float32)),
        _from_bytes(rows[..., ROPE_BYTE:], BF16),
    )


def _power_of_two_at_or_above(scales: Any) -> Any:
    """Biased exponent + 1 if the mantissa is not zero; inf and NaN stay what they are."""
    xp = scales.__array_namespace__()
    bits = scales.view(np.int32)
    exponent = (bits >> np.int32(23)) + (bits & np.int32(0x7FFFFF) != np.int32(0)).astype(np.int32)
    return xp.where(xp.isfinite(scales), (exponent << np.int32(23)).view(np.float32), scales)


def _opaque(x: Any) -> Any:
    """The same values, of which XLA cannot see the origin: it multiplies by the reciprocal of a constant or broadcast
    divisor, which has another last bit."""
    return jax.lax.optimization_barrier(x) if isinstance(x, jax.Array) else x


def _to_bytes(x: Any) -> Any:
    """[..., n] of any type -> uint8 [..., n * itemsize], little-endian."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view(UINT8)
    as_bytes = jax.lax.bitcast_convert_type(x, UINT8)
    return as_bytes if as_bytes.ndim == x.ndim else as_bytes.reshape(*x.shape[:-1], -1)


def _from_bytes(x: Any, dtype: np.dtype) -> Any:
    """uint8 [..., n * itemsize] -> [..., n]."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view(dtype)
    if dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, dtype)
    return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, dtype.itemsize), dtype)
