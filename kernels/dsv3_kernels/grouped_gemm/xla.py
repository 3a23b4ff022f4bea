"""The grouped FP8 GEMMs for any backend: one dense matmul at a time, of a block of rows or of a group.

Each step dequantises what it multiplies, so that the float32 copy is one group's weight and not all of them. On GPUs a
loop of known length over the blocks of the contraction takes all rows at once, in bfloat16 (see `gemm.xla`); a loop
whose length or branches depend on data would make the host wait for each step.
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
    a: QTensor, b: QTensor, block_group: Array, accumulate_into: Array | None = None, *, num_groups: int
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


def grouped_fp8_gemm_in_bf16(
    a: QTensor, b: QTensor, block_group: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """Twin of `grouped_fp8_gemm` for GPUs: all blocks of rows at once, with a copy of its weight's 128 columns each."""
    M, N = a.values.shape[0], b.values.shape[1]
    a, b = dense.in_whole_blocks(a), dense.in_whole_blocks(b)
    rows = jax.tree.map(lambda x: x.reshape(M // BLOCK, BLOCK, x.shape[-1]), a)
    groups = jnp.clip(block_group, 0, b.values.shape[0] - 1)

    def product(k: Array) -> Array:
        weights = jax.tree.map(lambda x: x[groups], dense.block_of(b, k))
        return dense.scaled_product(dense.block_of(rows, k), weights)

    out = dense.sum_over_blocks(product, (M // BLOCK, BLOCK, N), a, (b, block_group))
    return jnp.where((block_group >= 0)[:, None, None], out, 0).astype(out_dtype).reshape(M, N)


def grouped_fp8_gemm_masked_in_bf16(
    a: QTensor, b: QTensor, valid_rows: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "G M N"]:
    """Twin of `grouped_fp8_gemm_masked` for GPUs: all groups at once."""
    G, M, N = *a.values.shape[:2], b.values.shape[1]
    a, b = dense.in_whole_blocks(a), dense.in_whole_blocks(b)
    out = dense.sum_over_blocks(
        lambda k: dense.scaled_product(dense.block_of(a, k), dense.block_of(b, k)), (G, M, N), a, b
    )
    is_valid = jnp.arange(M, dtype=jnp.int32)[None, :] < valid_rows[:, None]
    return jnp.where(is_valid[:, :, None], out, 0).astype(out_dtype)


def grouped_fp8_gemm_k_in_bf16(
    a: QTensor, b: QTensor, block_group: Array, accumulate_into: Array | None = None, *, num_groups: int
) -> Float[Array, "G M N"]:
    """Twin of `grouped_fp8_gemm_k` for GPUs: a block that no group claims is multiplied, too, and adds zeros."""

    def add_block(k: Array, sums: Array) -> Array:
        product = dense.scaled_product(dense.block_of(a, k), dense.block_of(b, k))
        group = jnp.maximum(block_group[k], 0)
        sum_of_group = jax.lax.dynamic_index_in_dim(sums, group, keepdims=False)
        sum_of_group += jnp.where(block_group[k] >= 0, product, 0)
        return jax.lax.dynamic_update_index_in_dim(sums, sum_of_group, group, axis=0)

    shape = (num_groups, a.values.shape[0], b.values.shape[0])
    sums = varying_as(jnp.zeros(shape, jnp.float32), a, b, block_group)
    sums = jax.lax.fori_loop(0, block_group.shape[0], add_block, sums)
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
