"""The grouped FP8 GEMMs for any backend: one dense product at a time, of a block of rows or of a group.

Each step dequantises what it multiplies, so that the float32 copy is one group's weight and not all of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_kernels.gemm import xla as dense
from dsv3_kernels.operands import BLOCK, num_blocks
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.varying import varying_as


def grouped_fp8_gemm(
    a: QTensor, b: QTensor, block_group: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """One step a block of 128 rows; a block that no group claims costs nothing."""
    M, K = a.values.shape
    N = b.values.shape[1]

    def block_rows(block: tuple[QTensor, Array]) -> Array:
        rows, group = block
        return jax.lax.cond(
            group >= 0,
            lambda: dense.fp8_gemm(rows, _group(b, group), out_dtype=out_dtype),
            lambda: varying_as(jnp.zeros((BLOCK, N), out_dtype), a, b, block_group),
        )

    blocks = QTensor(a.values.reshape(-1, BLOCK, K), a.scales.reshape(-1, BLOCK, num_blocks(K)))
    return jax.lax.map(block_rows, (blocks, block_group)).reshape(M, N)


def grouped_fp8_gemm_masked(
    a: QTensor, b: QTensor, valid_rows: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "G M N"]:
    """One step a group; padding rows are multiplied, too, and then replaced by zeros."""
    row = jnp.arange(a.values.shape[1], dtype=jnp.int32)

    def group_rows(group: tuple[QTensor, QTensor, Array]) -> Array:
        own_a, own_b, count = group
        product = dense.fp8_gemm(own_a, own_b, out_dtype=out_dtype)
        return jnp.where((row < count)[:, None], product, jnp.zeros_like(product))

    return jax.lax.map(group_rows, (a, b, valid_rows))


def grouped_fp8_gemm_k(
    a: QTensor, b: QTensor, block_group: Array, *, num_groups: int, accumulate_into: Array | None = None
) -> Float[Array, "G M N"]:
    """One step a block of the contraction, added to its group's sum in place."""
    M, N = a.values.shape[0], b.values.shape[0]

    def add_block(sums: Array, block: tuple[QTensor, QTensor, Array]) -> tuple[Array, None]:
        own_a, own_b, group = block
        product = jax.lax.cond(
            group >= 0,
            lambda: dense.fp8_gemm(own_a, own_b, out_dtype=jnp.float32),
            lambda: varying_as(jnp.zeros((M, N), jnp.float32), a, b, block_group),
        )
        return sums.at[jnp.maximum(group, 0)].add(product), None

    sums = varying_as(jnp.zeros((num_groups, M, N), jnp.float32), a, b, block_group)
    sums, _ = jax.lax.scan(add_block, sums, (_contraction_blocks(a), _contraction_blocks(b), block_group))
    return sums if accumulate_into is None else sums + accumulate_into


def _contraction_blocks(q: QTensor) -> QTensor:
    """[R, K] -> values [K/128, R, 128] and scales [K/128, R, 1]."""
    R, K = q.values.shape
    values = q.values.reshape(R, K // BLOCK, BLOCK).transpose(1, 0, 2)
    return QTensor(values, q.scales.T[:, :, None])


def _group(q: QTensor, group: Array) -> QTensor:
    return QTensor(
        jax.lax.dynamic_index_in_dim(q.values, group, keepdims=False),
        jax.lax.dynamic_index_in_dim(q.scales, group, keepdims=False),
    )
