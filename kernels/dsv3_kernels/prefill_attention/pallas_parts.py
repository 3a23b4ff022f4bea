"""What the forward and backward kernels share: shapes of shared memory, the mask, matmuls with registers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_gpu: Any = plgpu
"""What type checkers cannot see: ACC, and that transforms are no abstract classes."""

QK_DIM, V_DIM = 192, 128
ROWS = 64
"""Rows of a warpgroup's tile: what one wgmma has."""
CONSUMERS = 2
"""Warpgroups that compute; one more loads."""
TILE = CONSUMERS * ROWS
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
"""Layouts of one element a row, or a column, of a matrix."""


def matrix_memory(*shape: int) -> Any:
    """Shared memory for bfloat16 matrices, laid out as wgmma reads them."""
    transforms = (_gpu.TilingTransform((8, 64)), _gpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def zeros(*shape: int) -> jax.Array:
    """A float32 matrix in registers, to add matmuls to."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def over_columns(x: jax.Array, num_columns: int) -> jax.Array:
    """One element a row, repeated over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], num_columns), [0])


def over_rows(x: jax.Array, num_rows: int) -> jax.Array:
    """One element a column, repeated over the rows."""
    return lax.broadcast_in_dim(x, (num_rows, x.shape[0]), [1])


def positions(shape: tuple[int, int], axis: int, first: Any, *, interpret: Any) -> jax.Array:
    """first, first + 1, … along `axis`; the interpreter does not know Mosaic's own iota."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis) + first
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX) + first


def same_ids(by_row: Any, by_column: Any) -> jax.Array:
    """Where a row's id, in shared memory, is the column's."""
    row_ids = plgpu.load(by_row, layout=BY_ROW)
    column_ids = plgpu.load(by_column, layout=BY_COLUMN)
    return over_columns(row_ids, column_ids.shape[0]) == over_rows(column_ids, row_ids.shape[0])


def visit_all(
    visit: Callable[[bool], Callable[[Any, Any], Any]], begin: Any, full_begin: Any, full_end: Any, end: Any, carry: Any
) -> Any:
    """The carry after blocks begin .. end - 1: steps with a mask, but from full_begin to full_end - 1 without."""
    carry = lax.fori_loop(begin, full_begin, visit(True), carry)
    carry = lax.fori_loop(full_begin, full_end, visit(False), carry)
    return lax.fori_loop(full_end, end, visit(True), carry)


def product(
    parts: Sequence[tuple[Any, Any]], shape: tuple[int, ...], meanwhile: Callable[[], None] | None = None
) -> jax.Array:
    """Σ a · b of pairs of matrices in shared memory; `meanwhile` runs while the tensor cores do."""

    def multiply(acc_ref):
        for a, b in parts:
            plgpu.wgmma(acc_ref, a, b)
        if meanwhile is not None:
            meanwhile()
        return acc_ref[...]

    return pl.run_scoped(multiply, _gpu.ACC(shape, jnp.float32))


def add_product(
    acc: jax.Array, a: jax.Array, b: Any, meanwhile: Callable[[], None] | None = None, *, interpret: Any
) -> jax.Array:
    """acc + a · b with `a` in registers, `b` in shared memory; the interpreter has no such matmul."""
    if interpret:
        if meanwhile is not None:
            meanwhile()
        return acc + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        if meanwhile is not None:
            meanwhile()

    return pl.run_state(multiply)(_gpu.ACC.init(acc))


def product_from(start: jax.Array, a: Any, b: Any, *, interpret: Any) -> jax.Array:
    """start + a · b of two matrices in shared memory."""
    if interpret:
        return start + product([(a, b)], start.shape)

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(multiply)(_gpu.ACC.init(start))


def unhoisted(index: jax.Array, i: jax.Array) -> jax.Array:
    """`index`, written so that the compiler takes it to differ in each iteration i of a loop.

    Else it makes the descriptors of all matmuls with this operand before the loop, a register each, and spills them.
    """
    return index + lax.shift_right_logical(i, np.int32(30))
