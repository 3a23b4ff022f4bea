"""What the Hopper kernel of `fp8_gemm` does not take."""

from jax.typing import ArrayLike, DTypeLike

from dsv3_kernels.quantize import QTensor


def refuses(a: QTensor, b: QTensor, accumulate_into: ArrayLike | None, *, out_dtype: DTypeLike) -> str | None:
    """The reason, or None: an empty operand."""
    sizes = (*a.values.shape, *b.values.shape)
    return None if min(sizes) else f"has an empty operand, a {a.values.shape} or b {b.values.shape}: skip the call"
