"""The grouped FP8 GEMMs by their definitions: every group's dense matmul, and the rows that are its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_kernels.gemm import reference as dense
from dsv3_kernels.operands import BLOCK, num_blocks
from dsv3_kernels.quantize import QTensor


def grouped_fp8_gemm(
    a: QTensor, b: QTensor, block_group: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """Rows of block i are those of a · b[block_group[i]]ᵀ; zeros where no group claims them."""
    G, N, _ = b.values.shape
    row_group = jnp.repeat(block_group, BLOCK)
    out = jnp.zeros((a.values.shape[0], N), out_dtype)
    for group in range(G):
        product = dense.fp8_gemm(a, _group(b, group), out_dtype=out_dtype)
        out = jnp.where((row_group == group)[:, None], product, out)
    return out


def grouped_fp8_gemm_masked(
    a: QTensor, b: QTensor, valid_rows: Array, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "G M N"]:
    """The first valid_rows[g] rows of a[g] · b[g]ᵀ, zeros below."""
    G, M, _ = a.values.shape
    out = jnp.zeros((G, M, b.values.shape[1]), out_dtype)
    for group in range(G):
        product = dense.fp8_gemm(_group(a, group), _group(b, group), out_dtype=out_dtype)
        is_valid = jnp.arange(M, dtype=jnp.int32) < valid_rows[group]
        out = out.at[group].set(jnp.where(is_valid[:, None], product, jnp.zeros_like(product)))
    return out


def grouped_fp8_gemm_k(
    a: QTensor, b: QTensor, block_group: Array, accumulate_into: Array | None = None, *, num_groups: int
) -> Float[Array, "G M N"]:
    """out[g] is the sum of the matmuls of the blocks of the contraction that belong to g."""
    M, K = a.values.shape
    N = b.values.shape[0]
    out = jnp.zeros((num_groups, M, N), jnp.float32)
    for block in range(num_blocks(K)):
        is_own = jnp.arange(num_groups, dtype=jnp.int32) == block_group[block]
        product = dense.block_product(a, b, block)
        out = out + jnp.where(is_own[:, None, None], product[None], jnp.zeros_like(out))
    return out if accumulate_into is None else out + accumulate_into


def _group(q: QTensor, group: int) -> QTensor:
    return QTensor(q.values[group], q.scales[group])
