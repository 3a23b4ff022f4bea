"""The FP8 GEMM for any backend: dequantised operands and one float32 product.

A product of two E4M3 numbers and their scales is rounded once before it is added, where the definition rounds it not
at all and the sum of a block twice: a difference of a few units in the last place of float32. It takes 4 bytes an
element of both operands; one product batched over the blocks would take 4 M N K / 128.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_kernels.operands import BLOCK, row_tile
from dsv3_kernels.quantize import QTensor, dequantize_tiles


def fp8_gemm(
    a: QTensor, b: QTensor, *, out_dtype: jax.typing.DTypeLike, accumulate_into: Array | None = None
) -> Float[Array, "M N"]:
    """dequantised a · (dequantised b)ᵀ in float32, plus `accumulate_into`."""
    out = jnp.einsum("mk,nk->mn", dequantized(a), dequantized(b), precision=jax.lax.Precision.HIGHEST)
    if accumulate_into is not None:
        out = out + accumulate_into
    return out.astype(out_dtype)


def dequantized(q: QTensor) -> Float[Array, "*batch R K"]:
    """Float32 values of an operand whose rows share a scale alone or by 128."""
    return jnp.asarray(dequantize_tiles(q, tile=(row_tile(q), BLOCK), dtype=jnp.float32))
