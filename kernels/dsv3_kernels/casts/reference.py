"""The casts written plainly, which XLA fuses; `quantize` defines the rounding.

NumPy arrays give NumPy arrays, JAX arrays (also traced) give JAX arrays.
"""

from typing import Any

import numpy as np

from dsv3_kernels.quantize import QTensor, dequantize_tiles, quantize_tiles

TOKEN = (1, 128)
BLOCK = (128, 128)


def cast_tokens(x: Any, *, scale: str) -> QTensor:
    """x [..., M, K] in tiles of 1x128."""
    return quantize_tiles(x, tile=TOKEN, scale=scale)


def swiglu_cast(gate_up: Any, *, scale: str) -> QTensor:
    """silu(gate) * up in float32, in tiles of 1x128, of gate_up [..., M, 2 F]; silu(g) = g / (1 + exp(-g))."""
    xp = gate_up.__array_namespace__()
    gate, up = xp.split(gate_up.astype(np.float32), 2, axis=-1)
    with np.errstate(over="ignore"):  # exp(-g) = inf makes silu(g) = -0, its limit
        product = gate / (np.float32(1) + xp.exp(-gate)) * up
    return quantize_tiles(product, tile=TOKEN, scale=scale)


def requantize_transposed(q: QTensor, *, scale: str) -> QTensor:
    """Dequantises 1x128 tiles of [M, K], and casts the transpose [K, M] in tiles of 1x128."""
    return quantize_tiles(dequantize_tiles(q, tile=TOKEN).T, tile=TOKEN, scale=scale)


def cast_blocks(w: Any, *, scale: str) -> QTensor:
    """w [..., N, K] in tiles of 128x128."""
    return quantize_tiles(w, tile=BLOCK, scale=scale)
