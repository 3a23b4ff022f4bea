"""What the Hopper kernels of the casts do not take: the reason, with what to change, or None."""

import math

import jax

from dsv3_kernels.quantize import QTensor

TILE = 128
LEAST_ROWS = 8
"""Rows of 128 that a warpgroup takes at least."""


def of_tokens(x: jax.Array, *, scale: str) -> str | None:
    """K in tiles of 128, and at least 8 tiles, or a multiple."""
    count, rest = math.prod(x.shape[:-1]) * (x.shape[-1] // TILE), x.shape[-1] % TILE
    if rest or not count or count % LEAST_ROWS:
        return (
            f"takes K in multiples of {TILE}, and M K / {TILE} in positive multiples of {LEAST_ROWS}, not x"
            f" {list(x.shape)}: pad it"
        )
    return None


def of_swiglu(gate_up: jax.Array, *, scale: str) -> str | None:
    """F in multiples of 8 tiles."""
    width = TILE * LEAST_ROWS
    if not gate_up.size or gate_up.shape[-1] // 2 % width:
        return f"takes F in multiples of {width} and no empty array, not gate_up {list(gate_up.shape)}: pad it"
    return None


def of_blocks(w: jax.Array, *, scale: str) -> str | None:
    """Whole blocks."""
    if not w.size or w.shape[-1] % TILE or w.shape[-2] % TILE:
        return f"takes N and K in positive multiples of {TILE}, not w {list(w.shape)}: pad it"
    return None


def of_transposed(q: QTensor, *, scale: str) -> str | None:
    """Whole tiles of 128 tokens by 128 channels."""
    if not q.values.size or q.values.shape[0] % TILE or q.values.shape[1] % TILE:
        return f"takes M and K in positive multiples of {TILE}, not q {list(q.values.shape)}: pad it"
    return None
