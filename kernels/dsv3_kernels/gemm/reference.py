"""The FP8 GEMM by its definition: a loop over the blocks of the contraction."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_kernels.operands import BLOCK, num_blocks, row_tile
from dsv3_kernels.quantize import QTensor


def fp8_gemm(
    a: QTensor, b: QTensor, accumulate_into: Array | None = None, *, out_dtype: jax.typing.DTypeLike
) -> Float[Array, "M N"]:
    """Σ over blocks k of (a_k · b_kᵀ) · a_scale[:, k] · b_scale[:, k], every sum in float32."""
    M, K = a.values.shape
    N = b.values.shape[0]
    out = jnp.zeros((M, N), jnp.float32)
    for block in range(num_blocks(K)):
        out = out + block_product(a, b, block)
    if accumulate_into is not None:
        out = out + accumulate_into
    return out.astype(out_dtype)


def block_product(a: QTensor, b: QTensor, block: int) -> Float[Array, "M N"]:
    """What the 128 elements of the contraction from 128 * block on add to a · bᵀ."""
    N = b.values.shape[0]
    a_block = a.values[:, block * BLOCK : (block + 1) * BLOCK].astype(jnp.float32)
    b_block = b.values[:, block * BLOCK : (block + 1) * BLOCK].astype(jnp.float32)
    partial = jnp.dot(a_block, b_block.T, precision=jax.lax.Precision.HIGHEST)
    b_scale = jnp.repeat(b.scales[:, block], row_tile(b))[:N]
    return partial * a.scales[:, block][:, None] * b_scale[None, :]
