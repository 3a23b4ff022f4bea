"""Quantised operands of a GEMM at the boundary of an op: what a caller may pass, and what to do about the rest.

A GEMM contracts the last axis of both operands, in blocks of 128 that share scales. Rows share a scale alone
(1x128: activations, and both operands of a weight gradient) or by 128 (128x128: weights).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_kernels.quantize import E4M3, QTensor

BLOCK = 128
"""Elements of the contraction that share a scale, and rows of a weight that do."""


def num_blocks(size: int) -> int:
    """ceil(size / 128)."""
    return -(-size // BLOCK)


def row_tile(q: QTensor) -> int:
    """Rows of `q` that share a scale: 1 or 128, read off the shapes (which agree with both if there is one row)."""
    return 1 if q.scales.shape[-2] == q.values.shape[-2] else BLOCK


def checked_operand(op: str, name: str, q: Any, *, rank: int, row_tiles: Sequence[int]) -> QTensor:
    """The operand as JAX arrays, after a look at its dtypes, its rank and the shape of its scales.

    Args:
        op: the name of the op, for messages.
        name: the name of the operand, for messages.
        rank: axes of the values.
        row_tiles: how many rows may share a scale: 1, 128 or both.
    Raises: ValueError with the value, the rule and how to fix it.
    """
    if not (hasattr(q, "values") and hasattr(q, "scales")):
        raise ValueError(
            f"{op}: {name} is a {type(q).__name__} and must be a QTensor of E4M3 values and scales; make it with "
            "quantize_tiles."
        )
    values, scales = _array(q.values), _array(q.scales)
    if values.dtype != E4M3:
        raise ValueError(
            f"{op}: {name}.values has dtype {values.dtype} and must be float8_e4m3fn; make it with quantize_tiles."
        )
    if scales.dtype != jnp.float32:
        raise ValueError(
            f"{op}: {name}.scales has dtype {scales.dtype} and must be float32, also for power-of-two scales "
            '(quantize_tiles(..., scale="ue8m0") makes those).'
        )
    if values.ndim != rank:
        raise ValueError(f"{op}: {name}.values has shape {values.shape} and must have {rank} axes; reshape it.")
    *batch, rows, columns = values.shape
    expected = {tile: (*batch, -(-rows // tile), num_blocks(columns)) for tile in row_tiles}
    if scales.shape not in expected.values():
        rules = " or ".join(f"{shape} (tile=({tile}, {BLOCK}))" for tile, shape in expected.items())
        raise ValueError(
            f"{op}: {name}.scales has shape {scales.shape}, but values {values.shape} need {rules}; "
            "quantise with that tile."
        )
    return QTensor(values, scales)


def check_contraction(op: str, a: QTensor, b: QTensor) -> None:
    """Raises ValueError unless `a` and `b` have one K, their last axis."""
    if a.values.shape[-1] != b.values.shape[-1]:
        raise ValueError(
            f"{op}: a.values {a.values.shape} and b.values {b.values.shape} differ in K, the last axis of both; "
            f"pass b as [{'N, K' if b.values.ndim == 2 else 'G, N, K'}], that is transposed."
        )


def checked_groups(
    op: str, name: str, ids: Any, *, length: int, rule: str, lowest: int, highest: int, each: str
) -> jax.Array:
    """One int32 for each `each`, as a JAX array.

    The elements themselves are looked at in a NumPy array only: those of a JAX array may not be known yet.

    Raises: ValueError for another shape or dtype, or an element outside `lowest` ... `highest`, which `rule` explains.
    """
    array = _array(ids)
    if array.dtype != jnp.int32:
        raise ValueError(f"{op}: {name} has dtype {array.dtype} and must be int32; cast it.")
    if array.shape != (length,):
        raise ValueError(
            f"{op}: {name} has shape {array.shape} and must be ({length},); give one number for each {each}."
        )
    if isinstance(ids, np.ndarray) and ids.size and not lowest <= ids.min() <= ids.max() <= highest:
        wrong = int(ids.min() if ids.min() < lowest else ids.max())
        raise ValueError(f"{op}: {name} holds {wrong} and must be {lowest} to {highest}; {rule}.")
    return array


def check_neighbours(op: str, name: str, ids: Any) -> None:
    """Raises ValueError if the blocks of a group are not side by side in a NumPy array of groups."""
    if isinstance(ids, np.ndarray):
        first = ids[np.flatnonzero(np.diff(ids, prepend=-1))]
        groups, runs = np.unique(first[first >= 0], return_counts=True)
        if (runs > 1).any():
            raise ValueError(
                f"{op}: the blocks of group {int(groups[runs > 1][0])} in {name} are not side by side; sort the "
                "contraction by group."
            )


def check_output_dtype(op: str, dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError unless `dtype` is bfloat16 or float32."""
    if np.dtype(dtype) not in (np.dtype(jnp.bfloat16), np.dtype(jnp.float32)):
        raise ValueError(f"{op}: out_dtype={np.dtype(dtype).name} must be bfloat16 or float32; cast the result.")


def checked_accumulator(op: str, array: Any, *, shape: tuple[int, ...]) -> jax.Array:
    """The float32 buffer that a result is added to; raises ValueError for another shape or dtype."""
    buffer = _array(array)
    if buffer.dtype != jnp.float32 or buffer.shape != shape:
        raise ValueError(
            f"{op}: accumulate_into is {buffer.dtype}{list(buffer.shape)} and must be float32{list(shape)}, "
            "the shape of the result; sums over many steps lose too much in anything narrower."
        )
    return buffer


def _array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
