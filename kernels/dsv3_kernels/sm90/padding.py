"""Operands as the copy engine of Hopper wants them, and the output as the caller does.

A copy reaches beyond an edge (it reads zeros there, and drops what it writes), so no operand is padded to whole tiles.
But its box is made of tiles of 8 rows by one swizzle, so rows come in eights, and strides in 16 bytes. None of this
changes the shapes of the model; other operands are padded with zeros here.
"""

import jax
import jax.numpy as jnp

from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90.mainloop import Operands
from dsv3_kernels.sm90.tile import BLOCK_K, Tile, output_chunk

ROWS = 8


def check_sizes(op: str, K: int, *sizes: int) -> None:
    """Raises NotImplementedError for what the kernels do not serve."""
    if K % BLOCK_K:
        raise NotImplementedError(f"{op}: the Hopper kernel needs K in blocks of {BLOCK_K}, not K={K}.")
    if min(K, *sizes) < 1:
        raise NotImplementedError(f"{op}: the Hopper kernel has no empty operands, and a size here is 0.")


def padded_operands(a: QTensor, b: QTensor) -> Operands:
    """Values in full eights of rows, scales with those of one stage side by side."""
    return Operands(_rows(a.values, -2), _rows(_swap(a.scales), -1), _rows(b.values, -2), _rows(_swap(b.scales), -1))


def padded_output(tile: Tile, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """Of an output [..., M, N]: M in eights, N in full swizzles."""
    _, swizzle = output_chunk(tile.columns, dtype)
    *lead, M, N = shape
    return jax.ShapeDtypeStruct((*lead, _up(M, ROWS), _up(N, swizzle // jnp.dtype(dtype).itemsize)), dtype)


def pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x with zeros at the ends of its axes."""
    return x if x.shape == shape else jnp.pad(x, [(0, to - size) for to, size in zip(shape, x.shape)])


def cut_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x without what is behind `shape`."""
    return x if x.shape == shape else x[tuple(slice(size) for size in shape)]


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _rows(x: jax.Array, axis: int) -> jax.Array:
    shape = list(x.shape)
    shape[axis] = _up(shape[axis], ROWS)
    return pad_to(x, tuple(shape))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
