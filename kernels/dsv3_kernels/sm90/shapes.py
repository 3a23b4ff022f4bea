"""Shapes of operands, to compile a kernel without any."""

import jax
import jax.numpy as jnp

from dsv3_kernels.quantize import E4M3, QTensor
from dsv3_kernels.sm90.tile import BLOCK_K


def operand(shape: tuple[int, ...], rows: int) -> QTensor:
    """E4M3 values [..., R, K] with a scale for `rows` x 128 of them."""
    *lead, R, K = shape
    scales = jax.ShapeDtypeStruct((*lead, -(-R // rows), -(-K // BLOCK_K)), jnp.float32)
    return QTensor(jax.ShapeDtypeStruct(shape, E4M3), scales)


def integers(count: int) -> jax.ShapeDtypeStruct:
    """int32 [count]."""
    return jax.ShapeDtypeStruct((count,), jnp.int32)
