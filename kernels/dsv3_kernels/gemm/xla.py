"""The FP8 GEMM for any backend: dequantised operands and one float32 matmul, or on GPUs a bfloat16 one a block.

A product of two E4M3 values and their scales is rounded once before it is added, where the definition rounds it not
at all and the sum of a block twice: a difference of a few units in the last place of float32. It takes 4 bytes an
element of both operands; one matmul batched over the blocks would take 4 M N K / 128.

GPUs multiply float32 at a small part of the rate of bfloat16, in which E4M3 is exact. There a loop of known length
takes one block of the contraction at a time, so that scales are applied to sums of 128 as in the definition.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_kernels.operands import BLOCK, row_tile
from dsv3_kernels.quantize import QTensor, dequantize_tiles
from dsv3_kernels.varying import varying_as


def fp8_gemm(
    a: QTensor, b: QTensor, accumulate_into: Array | None = None, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """dequantised a · (dequantised b)ᵀ in float32, plus `accumulate_into`."""
    out = jnp.einsum("mk,nk->mn", dequantized(a), dequantized(b), precision=jax.lax.Precision.HIGHEST)
    if accumulate_into is not None:
        out = out + accumulate_into
    return out.astype(out_dtype)


def dequantized(q: QTensor) -> Float[Array, "*batch R K"]:
    """Float32 values of an operand whose rows share a scale alone or by 128."""
    return jnp.asarray(dequantize_tiles(q, tile=(row_tile(q), BLOCK), dtype=jnp.float32))


def fp8_gemm_in_bf16(
    a: QTensor, b: QTensor, accumulate_into: Array | None = None, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """Twin of `fp8_gemm` for GPUs: memory of the operands and the sums."""
    a, b = in_whole_blocks(a), in_whole_blocks(b)
    shape = (a.values.shape[0], b.values.shape[0])
    out = sum_over_blocks(lambda k: scaled_product(block_of(a, k), block_of(b, k)), shape, a, b)
    if accumulate_into is not None:
        out = out + accumulate_into
    return out.astype(out_dtype)


def sum_over_blocks(
    product: Callable[[Array], Array], shape: tuple[int, ...], a: QTensor, b: Any
) -> Float[Array, "*batch M N"]:
    """Σ product(k) in float32 over the blocks k of the contraction of `a` and `b`."""
    zeros = varying_as(jnp.zeros(shape, jnp.float32), a, b)
    return jax.lax.fori_loop(0, a.scales.shape[-1], lambda k, sums: sums + product(k), zeros)


def scaled_product(a: QTensor, b: QTensor) -> Float[Array, "*batch M N"]:
    """a · bᵀ of one block of the contraction: bfloat16 operands, a float32 sum, then both scales."""
    product = jnp.einsum(
        "...mk,...nk->...mn",
        a.values.astype(jnp.bfloat16),
        b.values.astype(jnp.bfloat16),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    b_scales = jnp.repeat(b.scales, row_tile(b), axis=-2)[..., : b.values.shape[-2], :]
    return product * a.scales * jnp.swapaxes(b_scales, -1, -2)


def block_of(q: QTensor, k: Array) -> QTensor:
    """Elements 128 k ... 128 k + 127 of the contraction, and their scales [..., R, 1]."""
    values = jax.lax.dynamic_slice_in_dim(q.values, k * BLOCK, BLOCK, axis=-1)
    return QTensor(values, jax.lax.dynamic_slice_in_dim(q.scales, k, 1, axis=-1))


def in_whole_blocks(q: QTensor) -> QTensor:
    """The operand with zeros up to a multiple of 128 in the contraction."""
    fill = -q.values.shape[-1] % BLOCK
    if not fill:
        return q
    return QTensor(jnp.pad(q.values, [(0, 0)] * (q.values.ndim - 1) + [(0, fill)]), q.scales)
