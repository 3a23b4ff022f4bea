"""Quantisation of matrices to E4M3 in tiles that share one scale.

The layout of DeepSeek-V3: weights in 128x128 tiles, activations in 1x128, transposed activations in 128x1
(report section 3.3). Every function takes NumPy arrays and gives NumPy arrays, or takes JAX arrays (also traced)
and gives JAX arrays, with the same bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from dsv3_kernels.derivative import without_gradient
from dsv3_kernels.scales import E4M3_MAX, reciprocal_of, scale_of

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

_TABLE = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


class QTensor(NamedTuple):
    """E4M3 `values` [..., R, C] with float32 `scales` [..., ceil(R/r), ceil(C/c)]: multiply to dequantise."""

    values: Any
    scales: Any


def quantize_tiles(
    x: Float[Array | np.ndarray, "*batch R C"], *, tile: tuple[int, int], scale: str = "float32"
) -> QTensor:
    """Rounds `x` to E4M3 with one scale a tile of `tile` = (rows, columns); edge tiles may be ragged.

    scale = max(amax, 1e-4) / 448, and with "ue8m0" the next power of two at or above it; values = x * (1 / scale),
    clipped to +-448 before the cast, which would overflow to NaN.

    With float32 scales quantise(dequantise(quantise(x))) equals quantise(x) bit for bit. The scale survives because
    for s = fl(a / 448) also fl(fl(448 s) / 448) = s: let 448 = 7 * 2^6 and a' = fl(7 s). If ulp(a') = 8 ulp(s), then
    a' = a, for |7 s - a| <= 3.5 ulp(s); else |a' - 7 s| <= 2 ulp(s), so s is the float nearest to a' / 7. (It fails
    for one in nine floats s that are no quotient fl(a / 448).)

    Args:
        x: any float type; computed in float32. Leading axes are a batch.
        tile: rows and columns that share a scale, such as (128, 128), (1, 128), (128, 1).
        scale: "float32", or "ue8m0" for scales that are powers of two.
    Returns: `QTensor` of the shape of `x`. A tile that holds a NaN or infinity has a non-finite scale.
    Raises: ValueError for what is no matrix of floats, a tile that is not positive, or an unknown `scale`.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}; it must be of a float type with two axes or more (for one row, x[None])."
        )
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile={tile} must be two positive numbers of rows and columns, such as (1, 128).")
    if scale not in ("float32", "ue8m0"):
        raise ValueError(f"scale={scale!r} is unknown; use 'float32' or 'ue8m0'.")
    x = without_gradient("quantize_tiles", x)
    xp = x.__array_namespace__()
    tiles = _tiles(x.astype(np.float32), tile)
    scales = scale_of(_amax(tiles), scale)
    with np.errstate(invalid="ignore"):  # a NaN: the scale tells
        scaled = tiles * reciprocal_of(scales)[..., :, None, :, None]
        values = xp.clip(scaled, np.float32(-E4M3_MAX), np.float32(E4M3_MAX)).astype(E4M3)
    return QTensor(_untile(values, x.shape), scales)


def dequantize_tiles(
    q: QTensor, *, tile: tuple[int, int], dtype: jax.typing.DTypeLike = np.float32
) -> Float[Array | np.ndarray, "*batch R C"]:
    """values * scales, multiplied in float32, then cast to `dtype`.

    Args:
        q: values [..., R, C] and scales [..., ceil(R/r), ceil(C/c)].
        tile: the tile they were made with; it cannot be inferred from the shapes when edge tiles are ragged.
    Raises: ValueError when the scales are not one a tile.
    """
    rows, columns = q.values.shape[-2:]
    expected = (*q.values.shape[:-2], -(-rows // tile[0]), -(-columns // tile[1]))
    if q.scales.shape != expected:
        raise ValueError(
            f"scales {q.scales.shape} do not fit values {q.values.shape} in tiles of {tile}; expected {expected}."
        )
    tiles = _tiles(_to_float32(without_gradient("dequantize_tiles", q.values)), tile)
    return _untile(tiles * q.scales.astype(np.float32)[..., :, None, :, None], q.values.shape).astype(dtype)


def _amax(tiles: Any) -> Any:
    """The largest magnitude of each tile; not finite if one element is not.

    Compares bits, which order magnitudes with infinity and then NaN on top. XLA's maximum of floats on CPUs loses NaNs
    in some shapes: with jaxlib 0.12.0.1 that of [16, 1, 4, 128] over its last axis.
    """
    return (tiles.view(np.int32) & np.int32(0x7FFFFFFF)).max(axis=(-3, -1)).view(np.float32)


def _to_float32(values: Any) -> Any:
    """The cast; by a table in NumPy, where that is four times faster."""
    if isinstance(values, np.ndarray):
        return _TABLE[values.view(np.uint8)]
    return values.astype(np.float32)


def _tiles(x: Any, tile: tuple[int, int]) -> Any:
    """[..., R, C] -> [..., ceil(R/r), r, ceil(C/c), c], filled with zeros."""
    r, c = tile
    *batch, rows, columns = x.shape
    if rows % r or columns % c:
        x = x.__array_namespace__().pad(x, [(0, 0)] * len(batch) + [(0, -rows % r), (0, -columns % c)])
    return x.reshape(*batch, -(-rows // r), r, -(-columns // c), c)


def _untile(tiles: Any, shape: tuple[int, ...]) -> Any:
    """Inverse of `_tiles`: drops the fill."""
    *batch, num_rows, r, num_columns, c = tiles.shape
    return tiles.reshape(*batch, num_rows * r, num_columns * c)[..., : shape[-2], : shape[-1]]
