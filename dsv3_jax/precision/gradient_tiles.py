"""How the gradient of an activation is quantised: in tiles of 1x128 by the recipe, of 128x128 by its control.

A loss that is a mean over a batch has gradients as small as one over its tokens: 1e-8 for the report's 63 million.
The quantiser takes no tile for smaller than 1e-4, so gradients are multiplied by 2^40 before it and their scales
divided after it: exact, and the same as if the floor lay at 1e-16.
"""

import jax.numpy as jnp

from dsv3_jax.typing import Array, Float
from dsv3_kernels import QTensor, quantize_tiles, requantize_transposed

Tile = tuple[int, int]

LIFT = 2.0**40
"""A gradient beyond 2^87 overflows, as would its square long before."""


def gradient_rows(dy: Float[Array, "M Z"], *, tile: Tile, scale: str = "float32") -> QTensor:
    """dy quantised in `tile`, with its scales given out row by row: the left operand of an input gradient."""
    q = quantize_tiles(dy.astype(jnp.float32) * LIFT, tile=tile, scale=scale)
    return QTensor(q.values, jnp.repeat(q.scales / LIFT, tile[0], axis=0)[: dy.shape[0]])


def gradient_columns(dy: Float[Array, "M Z"], *, tile: Tile) -> QTensor:
    """dyᵀ quantised in tiles that are as tall as `tile` and reach over 128 tokens: an operand of a weight gradient."""
    return gradient_rows(dy.T, tile=tile)


def transposed_gradient(q: QTensor) -> QTensor:
    """[M, Z] of power-of-two scales in tiles of 128 features -> [Z, M] in tiles of 128 tokens."""
    lifted = requantize_transposed(QTensor(q.values, q.scales * LIFT), scale="ue8m0")
    return QTensor(lifted.values, lifted.scales / LIFT)
