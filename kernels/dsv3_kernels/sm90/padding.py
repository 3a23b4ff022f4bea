"""Operands as the copy engine of Hopper wants them, and the output as the caller does.

A copy reaches beyond an edge (it reads zeros there, and drops what it writes), so no operand is padded to whole tiles.
But its box is made of tiles of 8 rows by one swizzle, so rows come in eights, and the contraction in 64 elements; and
rows of scales in 16 bytes, or by 4 where they are short (K = 2112 and 576, the input gradients of the latents). Of the
shapes of the model none has other values; weight gradients of a number of tokens that 512 does not divide have other
scales. What does not fit is padded with zeros here, which costs a copy of it.
"""

import jax
import jax.numpy as jnp

from dsv3_kernels.operands import row_tile
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90.mainloop import Operands, operand_swizzle
from dsv3_kernels.sm90.tile import PANEL, SCALE_ROWS, Tile, output_chunk, panel_columns

ROWS = 8


def padded_operands(a: QTensor, b: QTensor) -> Operands:
    """Values in full eights of rows and full swizzles of the contraction, scales in full panels."""
    width = panel_columns(a.values.shape[-1], is_b_scaled_by_row=row_tile(b) == 1)
    return Operands(_values(a), _scales(a, width), _values(b), _scales(b, width))


def padded_output(tile: Tile, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Of an output [..., M, N]: M in eights, N in full swizzles."""
    _, swizzle = output_chunk(tile.output_columns, dtype)
    *lead, M, N = shape
    return jax.ShapeDtypeStruct((*lead, _up(M, ROWS), _up(N, swizzle // jnp.dtype(dtype).itemsize)), dtype)


def pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x with zeros at the ends of its axes."""
    return x if x.shape == shape else jnp.pad(x, [(0, to - size) for to, size in zip(shape, x.shape)])


def cut_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x without what is behind `shape`."""
    return x if x.shape == shape else x[tuple(slice(size) for size in shape)]


def _values(q: QTensor) -> jax.Array:
    *lead, R, K = q.values.shape
    return pad_to(q.values, (*lead, _up(R, ROWS), _up(K, operand_swizzle(K))))


def _scales(q: QTensor, width: int) -> jax.Array:
    """In full panels, or in full fours of whole rows."""
    *lead, R, blocks = q.scales.shape
    if width == PANEL:
        return pad_to(q.scales, (*lead, R, _up(blocks, PANEL)))
    return pad_to(q.scales, (*lead, _up(R, SCALE_ROWS), blocks))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
