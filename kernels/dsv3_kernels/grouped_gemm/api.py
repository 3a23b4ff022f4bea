"""FP8 GEMMs of many groups in one call: the matmuls of a mixture of experts, forward and backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dsv3_kernels import dispatch
from dsv3_kernels.grouped_gemm import limits, reference, xla
from dsv3_kernels.operands import (
    BLOCK,
    check_contraction,
    check_neighbours,
    check_output_dtype,
    checked_accumulator,
    checked_groups,
    checked_operand,
)
from dsv3_kernels.quantize import QTensor


def _pallas(op: str) -> Callable[..., Array]:
    """The implementation for Hopper, in a module that needs jax 0.11.2 and loads when first used."""

    def form(*args: Any, **kwargs: Any) -> Array:
        from dsv3_kernels.grouped_gemm import pallas_sm90

        return getattr(pallas_sm90, op)(*args, **kwargs)

    return form


CONTIGUOUS = dispatch.Op(
    "grouped_fp8_gemm",
    reference=reference.grouped_fp8_gemm,
    xla=xla.grouped_fp8_gemm,
    kernel=_pallas("grouped_fp8_gemm"),
    refuses=limits.refuses,
    axes="mk mk gnk gnk m -> mn",
    xla_gpu=xla.grouped_fp8_gemm_in_bf16,
)
MASKED = dispatch.Op(
    "grouped_fp8_gemm_masked",
    reference=reference.grouped_fp8_gemm_masked,
    xla=xla.grouped_fp8_gemm_masked,
    kernel=_pallas("grouped_fp8_gemm_masked"),
    refuses=limits.refuses,
    axes="gmk gmk gnk gnk g -> gmn",
    xla_gpu=xla.grouped_fp8_gemm_masked_in_bf16,
)
CONTRACTION = dispatch.Op(
    "grouped_fp8_gemm_k",
    reference=reference.grouped_fp8_gemm_k,
    xla=xla.grouped_fp8_gemm_k,
    kernel=_pallas("grouped_fp8_gemm_k"),
    refuses=limits.refuses,
    axes="mk mk nk nk k gmn -> gmn",
    xla_gpu=xla.grouped_fp8_gemm_k_in_bf16,
)


def grouped_fp8_gemm(
    a: QTensor,
    b: QTensor,
    block_group: ArrayLike,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies each block of 128 rows of a [M, K] by its group's b[g]ᵀ (training, prefill).

    Args:
        a: values [M, K] with M a multiple of 128, scales [M, ceil(K/128)]. Pad a group's rows to full blocks.
        b: values [G, N, K], scales [G, ceil(N/128), ceil(K/128)].
        block_group: int32 [M/128], the group of each block, in any order; -1 skips it. Other ids outside 0..G-1 are
            detected in a NumPy array only.
        out_dtype: bfloat16 or float32.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [M, N]; rows of skipped blocks are zeros, whatever `a` holds there.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this device.
    """
    op = "grouped_fp8_gemm"
    a = checked_operand(op, "a", a, rank=2, row_tiles=(1,))
    b = checked_operand(op, "b", b, rank=3, row_tiles=(BLOCK,))
    check_contraction(op, a, b)
    check_output_dtype(op, out_dtype)
    M = a.values.shape[0]
    if M % BLOCK:
        raise ValueError(
            f"{op}: a has M={M} rows, which is no multiple of {BLOCK}; pad each group's rows to full blocks of {BLOCK}."
        )
    ids = checked_groups(
        op,
        "block_group",
        block_group,
        length=M // BLOCK,
        each=f"block of {BLOCK} rows of a",
        lowest=-1,
        highest=b.values.shape[0] - 1,
        rule="b has so many groups, and -1 skips a block",
    )
    return dispatch.run(CONTIGUOUS, implementation, a, b, ids, num_sms=num_sms, out_dtype=jnp.dtype(out_dtype))


def grouped_fp8_gemm_masked(
    a: QTensor,
    b: QTensor,
    valid_rows: ArrayLike,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "G M N"]:
    """Multiplies the first valid_rows[g] rows of a[g] by b[g]ᵀ: static shapes for decoding.

    Rows at or past valid_rows[g] come out as zeros in every implementation. Writing them costs 2 N bytes a row and
    no reading; left as they were they would be whatever the memory held, and a NaN there survives a combination weight
    of zero. Choose M near the rows that can arrive.

    Args:
        a: values [G, M, K], scales [G, M, ceil(K/128)]; M may be any size.
        b: values [G, N, K], scales [G, ceil(N/128), ceil(K/128)].
        valid_rows: int32 [G], 0 <= valid_rows[g] <= M.
        out_dtype: bfloat16 or float32.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [G, M, N].
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this device.
    """
    op = "grouped_fp8_gemm_masked"
    a = checked_operand(op, "a", a, rank=3, row_tiles=(1,))
    b = checked_operand(op, "b", b, rank=3, row_tiles=(BLOCK,))
    check_contraction(op, a, b)
    check_output_dtype(op, out_dtype)
    if a.values.shape[0] != b.values.shape[0]:
        raise ValueError(
            f"{op}: a.values {a.values.shape} and b.values {b.values.shape} differ in G, the first axis of both; "
            "pass one slab of rows a group."
        )
    counts = checked_groups(
        op,
        "valid_rows",
        valid_rows,
        length=a.values.shape[0],
        each="group",
        lowest=0,
        highest=a.values.shape[1],
        rule="a has so many rows a group; give it more, or clip",
    )
    return dispatch.run(MASKED, implementation, a, b, counts, num_sms=num_sms, out_dtype=jnp.dtype(out_dtype))


def grouped_fp8_gemm_k(
    a: QTensor,
    b: QTensor,
    block_group: ArrayLike,
    *,
    num_groups: int,
    accumulate_into: ArrayLike | None = None,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "G M N"]:
    """Sums a · bᵀ over each group's blocks of the contraction: weight gradients of experts.

    Args:
        a: values [M, K] with K a multiple of 128, scales [M, K/128].
        b: values [N, K], scales [N, K/128] (1x128 along the contraction, as a).
        block_group: int32 [K/128], the group of each 128 elements of K; blocks of one group lie side by side; -1 skips.
            Other ids outside 0..num_groups-1, and groups in several places, are detected in a NumPy array only.
        num_groups: G.
        accumulate_into: float32 [G, M, N] that the sums are added to. Donate it to reuse its memory.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: float32 [G, M, N]; a group without blocks gives zeros, or what it accumulates into.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this device.
    """
    op = "grouped_fp8_gemm_k"
    a = checked_operand(op, "a", a, rank=2, row_tiles=(1,))
    b = checked_operand(op, "b", b, rank=2, row_tiles=(1,))
    check_contraction(op, a, b)
    K = a.values.shape[1]
    if K % BLOCK:
        raise ValueError(
            f"{op}: K={K} is no multiple of {BLOCK}; pad each group's part of the contraction with zeros to full "
            f"blocks of {BLOCK}."
        )
    if num_groups < 1:
        raise ValueError(f"{op}: num_groups={num_groups} must be at least 1; give the number of weights.")
    ids = checked_groups(
        op,
        "block_group",
        block_group,
        length=K // BLOCK,
        each=f"{BLOCK} elements of K",
        lowest=-1,
        highest=num_groups - 1,
        rule="num_groups is how many there are, and -1 skips a block",
    )
    check_neighbours(op, "block_group", block_group)
    if accumulate_into is not None:
        shape = (num_groups, a.values.shape[0], b.values.shape[0])
        accumulate_into = checked_accumulator(op, accumulate_into, shape=shape)
    return dispatch.run(
        CONTRACTION, implementation, a, b, ids, accumulate_into, num_sms=num_sms, num_groups=int(num_groups)
    )
