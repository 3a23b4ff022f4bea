"""How an activation travels to its experts, in FP8, then home, in the compute dtype; gradients the other way round.

What an expert exchange sends of a token is E4M3 with one byte of exponent for 128 features: D + ⌈D/128⌉ bytes. The
scales are powers of two, so that a receiver can transpose a tile of 128 features of a token into tiles of 128 tokens
of a feature without rounding twice (report section 3.3.3).

`gather_payload` and `sum_payload_rows` are both ends for the experts of this device. An exchange between devices puts
its collectives where these gather bytes (`gather`) and sum rows; what lies between them never learns of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.precision.gradient_tiles import Tile, gradient_rows
from dsv3_jax.typing import Array, DType, Float, Int, UInt
from dsv3_kernels.quantize import E4M3, QTensor, dequantize_tiles, quantize_tiles
from dsv3_kernels.routed_experts.plan import BlockPlan
from dsv3_kernels.routed_experts.rows import no_gradient, sum_rows
from dsv3_kernels.varying import varying_alike

TILE = (1, 128)


class Payload(NamedTuple):
    """Bytes of E4M3 [N, D], and biased exponents of the scales (UE8M0) [N, ⌈D/128⌉]."""

    values: UInt[Array, "N D"]
    exponents: UInt[Array, "N Y"]


def gather_payload(x: Float[Array, "N D"], plan: BlockPlan) -> Float[Array, "M D"]:
    """Rows of their tokens, each token quantised once however many experts it goes to; zeros where a row is padding.

    In the dtype of x, which should be the compute dtype: elements of a payload are exact in bfloat16. The gradient of
    a token is the float32 sum of its rows'.
    """
    return _gather_payload(*varying_alike(x, plan))


def sum_payload_rows(rows: Float[Array, "M D"], plan: BlockPlan, *, gradient_tile: Tile = TILE) -> Float[Array, "N D"]:
    """Σ_k rows[slot_of[n, k]] in float32, in the dtype of `rows`: tokens come home as they are.

    Their gradient travels as tokens do: quantised once, in tiles of `gradient_tile`, and gathered as bytes.
    """
    return _sum_payload_rows(*varying_alike(rows, plan), gradient_tile)


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
    """The elements a payload stands for."""
    return jnp.asarray(dequantize_tiles(unpack(payload), tile=TILE, dtype=dtype))


def gather(payload: Payload, rows: Int[Array, "M"]) -> Payload:
    """Row m of the result is row rows[m] of the payload; zeros where that is past its end."""
    return Payload(
        payload.values.at[rows].get(mode="fill", fill_value=0),
        payload.exponents.at[rows].get(mode="fill", fill_value=127),  # a scale of 1
    )


@jax.custom_vjp
def _gather_payload(x, plan):
    return from_payload(gather(to_payload(x), plan.token_of), dtype=x.dtype)


def _gather_payload_forward(x, plan):
    return _gather_payload(x, plan), plan


def _gather_payload_backward(plan, d_rows):
    return sum_rows(d_rows, plan), no_gradient(plan)


_gather_payload.defvjp(_gather_payload_forward, _gather_payload_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_payload_rows(rows, plan, gradient_tile):
    return sum_rows(rows, plan)


def _sum_payload_rows_forward(rows, plan, gradient_tile):
    return sum_rows(rows, plan), plan


def _sum_payload_rows_backward(gradient_tile, plan, d_out):
    payload = pack(gradient_rows(d_out, tile=gradient_tile, scale="ue8m0"))
    return from_payload(gather(payload, plan.token_of), dtype=d_out.dtype), no_gradient(plan)


_sum_payload_rows.defvjp(_sum_payload_rows_forward, _sum_payload_rows_backward)
