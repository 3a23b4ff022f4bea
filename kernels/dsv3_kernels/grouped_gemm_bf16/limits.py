"""What the Hopper kernels of the grouped GEMMs do not take: the reason, with what to change, or None."""

from typing import Any

import jax
import jax.numpy as jnp

UNIT = 64
"""Rows that belong to one group at least: what one consumer multiplies, and one stage of a weight gradient."""


def of_rows(rows: jax.Array, weights: jax.Array, block_group: jax.Array, **static: Any) -> str | None:
    """bfloat16, in blocks of 64 rows or a multiple."""
    return _of(rows, weights, block_group)


def of_contraction(a: jax.Array, b: jax.Array, block_group: jax.Array, **static: Any) -> str | None:
    """bfloat16, in blocks of 64 rows or a multiple."""
    return _of(a, b, block_group)


def _of(x: jax.Array, y: jax.Array, block_group: jax.Array) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {x.dtype}: cast both operands"
    if not x.size or not y.size:
        return f"takes no empty operands, not {list(x.shape)} by {list(y.shape)}"
    block = x.shape[0] // block_group.shape[0]
    if block % UNIT:
        return f"takes blocks of {UNIT} rows or a multiple, not of {block}: pad each group's rows to full blocks"
    return None
