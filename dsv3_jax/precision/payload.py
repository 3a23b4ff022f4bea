"""What an expert exchange sends of an activation: E4M3 and one byte of exponent for 128 features.

The scales are powers of two, so that a receiver can turn a tile of 128 features of a token into tiles of 128 tokens
of a feature without rounding twice (report section 3.3.3). A row of D numbers takes D + ⌈D/128⌉ bytes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, DType, Float, Int, UInt
from dsv3_kernels.quantize import E4M3, QTensor, dequantize_tiles, quantize_tiles

TILE = (1, 128)


class Payload(NamedTuple):
    """Bytes of E4M3 [N, D], and biased exponents of the scales (UE8M0) [N, ⌈D/128⌉]."""

    values: UInt[Array, "N D"]
    exponents: UInt[Array, "N Y"]


def to_payload(x: Float[Array, "N D"]) -> Payload:
    """Quantises each token once, however many experts it goes to."""
    return pack(quantize_tiles(x, tile=TILE, scale="ue8m0"))


def pack(q: QTensor) -> Payload:
    """The bytes of a tensor whose scales are powers of two (any other scale is rounded down to one)."""
    exponents = (jax.lax.bitcast_convert_type(q.scales, jnp.int32) >> 23).astype(jnp.uint8)
    return Payload(jax.lax.bitcast_convert_type(q.values, jnp.uint8), exponents)


def unpack(payload: Payload) -> QTensor:
    """What a grouped GEMM takes; the inverse of `pack`."""
    scales = jax.lax.bitcast_convert_type(payload.exponents.astype(jnp.int32) << 23, jnp.float32)
    return QTensor(jax.lax.bitcast_convert_type(payload.values, E4M3), scales)


def from_payload(payload: Payload, *, dtype: DType = jnp.float32) -> Float[Array, "N D"]:
    """The numbers a payload stands for."""
    return jnp.asarray(dequantize_tiles(unpack(payload), tile=TILE, dtype=dtype))


def gather(payload: Payload, rows: Int[Array, "M"]) -> Payload:
    """Row m of the result is row rows[m] of the payload; zeros where that is past its end."""
    return Payload(
        payload.values.at[rows].get(mode="fill", fill_value=0),
        payload.exponents.at[rows].get(mode="fill", fill_value=127),  # a scale of 1
    )
