"""GEMMs of many groups in one call, in the dtype of their operands: the matmuls of a mixture of experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dsv3_kernels import dispatch
from dsv3_kernels.grouped_gemm_bf16 import limits, reference, xla
from dsv3_kernels.operands import check_neighbours, check_output_dtype, checked_groups

NO_GRADIENT = (
    "{op} cannot be differentiated; its gradients are grouped_matmul, transposed, and grouped_matmul_k: use "
    "dsv3_kernels.expert_ffn, which has gradients of its own."
)


def _pallas(op: str) -> Callable[..., Array]:
    """The implementation for Hopper, in a module that needs jax 0.11.2 and loads when first used."""

    def form(*args: Any, **kwargs: Any) -> Array:
        from dsv3_kernels.grouped_gemm_bf16 import pallas_sm90

        return getattr(pallas_sm90, op)(*args, **kwargs)

    return form


ROWS = dispatch.Op(
    "grouped_matmul",
    reference=reference.grouped_matmul,
    xla=xla.grouped_matmul,
    kernel=_pallas("grouped_matmul"),
    refuses=limits.of_rows,
    axes="ma g.. m -> m.",
    no_gradient=NO_GRADIENT,
)
CONTRACTION = dispatch.Op(
    "grouped_matmul_k",
    reference=reference.grouped_matmul_k,
    xla=xla.grouped_matmul_k,
    kernel=_pallas("grouped_matmul_k"),
    refuses=limits.of_contraction,
    axes="ma mz m -> gaz",
    no_gradient=NO_GRADIENT,
)


def grouped_matmul(
    rows: ArrayLike,
    weights: ArrayLike,
    block_group: ArrayLike,
    *,
    transposed: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M Z"]:
    """Multiplies each block of rows [M, A] by its group's weight [A, Z], summed in float32.

    Args:
        rows: [M, A], bfloat16 or float32. The kernel takes bfloat16.
        weights: [G, A, Z] in the dtype of rows; [G, Z, A] if `transposed`.
        block_group: int32 [M / block], the group of each block of rows, in any order, for any `block` that divides M;
            -1 skips it. The kernel takes blocks of 64 rows or a multiple. Other ids outside 0..G-1 are detected in a
            NumPy array only.
        transposed: multiplies by the transposes of the weights, which are read as they are stored.
        out_dtype: bfloat16 or float32; None for that of rows.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [M, Z]; rows of skipped blocks are zeros, whatever `rows` holds there.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this target.
    """
    op = ROWS.name
    rows, weights = _checked(op, "rows", rows, 2), _checked(op, "weights", weights, 3)
    out_dtype = np.dtype(rows.dtype if out_dtype is None else out_dtype)
    check_output_dtype(op, out_dtype)
    _check_alike(op, "weights", weights, rows)
    contracted = weights.shape[2 if transposed else 1]
    if contracted != rows.shape[1]:
        raise ValueError(
            f"{op}: rows {rows.shape} and weights {weights.shape} differ in the contraction, {rows.shape[1]} and "
            f"{contracted}; pass weights as [G, A, Z], or as [G, Z, A] with transposed=True."
        )
    ids = _checked_blocks(
        op, block_group, rows.shape[0], highest=weights.shape[0] - 1, rule="weights has so many groups"
    )
    return dispatch.run(
        ROWS, implementation, rows, weights, ids, num_sms=num_sms, transposed=bool(transposed), out_dtype=out_dtype
    )


def grouped_matmul_k(
    a: ArrayLike,
    b: ArrayLike,
    block_group: ArrayLike,
    *,
    num_groups: int,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    num_sms: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "G A Z"]:
    """Sums aᵀ · b over each group's rows, in float32: weight gradients of experts.

    Args:
        a: [M, A], bfloat16 or float32: the rows that were multiplied. The kernel takes bfloat16.
        b: [M, Z] in the dtype of a: the gradient of the result.
        block_group: int32 [M / block], as for `grouped_matmul`; blocks of one group lie side by side. Groups in several
            places are detected in a NumPy array only.
        num_groups: G.
        out_dtype: float32 or bfloat16.
        num_sms: multiprocessors that the kernel may use, to leave others to communication; None for all.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [G, A, Z]; a group without blocks gives zeros.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this target.
    """
    op = CONTRACTION.name
    a, b, out_dtype = _checked(op, "a", a, 2), _checked(op, "b", b, 2), np.dtype(out_dtype)
    check_output_dtype(op, out_dtype)
    _check_alike(op, "b", b, a)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"{op}: a {a.shape} and b {b.shape} differ in rows, which are contracted; pass as many of each."
        )
    if num_groups < 1:
        raise ValueError(f"{op}: num_groups={num_groups} must be at least 1; give the number of weights.")
    ids = _checked_blocks(op, block_group, a.shape[0], highest=num_groups - 1, rule="num_groups is how many there are")
    check_neighbours(op, "block_group", block_group)
    return dispatch.run(
        CONTRACTION, implementation, a, b, ids, num_sms=num_sms, num_groups=int(num_groups), out_dtype=out_dtype
    )


def _checked(op: str, name: str, x: Any, rank: int) -> jax.Array:
    array = jnp.asarray(x)
    if array.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{op}: {name} has dtype {array.dtype} and must be bfloat16 or float32; cast it.")
    if array.ndim != rank:
        raise ValueError(f"{op}: {name} has shape {array.shape} and must have {rank} axes; reshape it.")
    return array


def _check_alike(op: str, name: str, x: jax.Array, first: jax.Array) -> None:
    if x.dtype != first.dtype:
        raise ValueError(f"{op}: {name} has dtype {x.dtype} and the first operand {first.dtype}; cast one of them.")


def _checked_blocks(op: str, block_group: Any, num_rows: int, *, highest: int, rule: str) -> jax.Array:
    """The ids of blocks whose number divides the rows."""
    count = np.shape(block_group)[0] if np.ndim(block_group) == 1 else 0
    if num_rows % max(count, 1) or (num_rows and not count):
        raise ValueError(
            f"{op}: block_group has shape {np.shape(block_group)}, which does not divide M={num_rows} rows into equal "
            "blocks; give one group a block, and pad each group's rows to full blocks."
        )
    return checked_groups(
        op,
        "block_group",
        block_group,
        length=count,
        each="block of rows",
        lowest=-1,
        highest=highest,
        rule=f"{rule}, and -1 skips a block",
    )
