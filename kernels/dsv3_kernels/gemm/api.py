"""`fp8_gemm`: out = a · bᵀ of E4M3 operands with a scale per 128 elements of the contraction."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dsv3_kernels import dispatch
from dsv3_kernels.gemm import limits, reference, xla
from dsv3_kernels.operands import (
    BLOCK,
    check_contraction,
    check_output_dtype,
    checked_accumulator,
    checked_operand,
)
from dsv3_kernels.quantize import QTensor


def _pallas(*args: Any, **kwargs: Any) -> Array:
    """The implementation for Hopper, in a module that needs jax 0.11.2 and loads when first used."""
    from dsv3_kernels.gemm import pallas_sm90

    return pallas_sm90.fp8_gemm(*args, **kwargs)


OP = dispatch.Op(
    "fp8_gemm",
    reference=reference.fp8_gemm,
    xla=xla.fp8_gemm,
    kernel=_pallas,
    refuses=limits.refuses,
    axes="mk mk nk nk mn -> mn",
    xla_gpu=xla.fp8_gemm_in_bf16,
)


def fp8_gemm(
    a: QTensor,
    b: QTensor,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    accumulate_into: ArrayLike | None = None,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies a [M, K] by the transpose of b [N, K] (DeepSeek-V3 report, section 3.3).

    Two-level accumulation: the matmul over each 128 elements of K is a float32 partial sum, which is multiplied by
    both scales and added in float32. The implementations differ in the order of additions, so in float32's last bits.
    K, M and N may be any size; K % 128 != 0 leaves a shorter last block with a scale of its own.

    Args:
        a: values [M, K], scales [M, ceil(K/128)]: `quantize_tiles(x, tile=(1, 128))`.
        b: values [N, K]; scales [ceil(N/128), ceil(K/128)] of tile=(128, 128) (forward, input gradient) or
            [N, ceil(K/128)] of tile=(1, 128) (weight gradient).
        out_dtype: bfloat16 or float32; float32 with `accumulate_into`.
        accumulate_into: float32 [M, N] that the result is added to. Donate it to reuse its memory.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [M, N]. A NaN or infinity in a row of `a` stays in that row.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this device.
    """
    op = "fp8_gemm"
    a = checked_operand(op, "a", a, rank=2, row_tiles=(1,))
    b = checked_operand(op, "b", b, rank=2, row_tiles=(BLOCK, 1))
    check_contraction(op, a, b)
    check_output_dtype(op, out_dtype)
    if accumulate_into is not None:
        if jnp.dtype(out_dtype) != jnp.float32:
            raise ValueError(
                f"{op}: out_dtype={jnp.dtype(out_dtype).name} with accumulate_into; pass out_dtype=jnp.float32."
            )
        shape = (a.values.shape[0], b.values.shape[0])
        accumulate_into = checked_accumulator(op, accumulate_into, shape=shape)
    return dispatch.run(OP, implementation, a, b, accumulate_into, num_sms=num_sms, out_dtype=jnp.dtype(out_dtype))
