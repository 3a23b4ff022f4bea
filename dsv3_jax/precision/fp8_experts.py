"""The feed-forward of rows sorted by expert, in FP8: three grouped matmuls in each direction (report section 3.3.2).

It stands between the two ends of `wire`, and does not know whether rows came from this device or from another.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.precision.gradient_tiles import Tile, gradient_columns, gradient_rows, transposed_gradient
from dsv3_jax.precision.residuals import from_bytes, named, to_bytes
from dsv3_jax.precision.wire import pack, unpack
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import (
    QTensor,
    cast_blocks,
    cast_tokens,
    grouped_fp8_gemm,
    grouped_fp8_gemm_k,
    requantize_transposed,
    swiglu_cast,
)
from dsv3_kernels.quantize import dequantize_tiles
from dsv3_kernels.routed_experts.reference import swiglu
from dsv3_kernels.routed_experts.rows import no_gradient
from dsv3_kernels.varying import varying_alike

BLOCK_ROWS = 128
"""Rows of a block: what a grouped GEMM asks for."""


def expert_ffn(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "M"],
    block_expert: Int[Array, "X"],
    *,
    gradient_tile: Tile = (1, 128),
) -> Float[Array, "M D"]:
    """weight · FFN_expert(row) of each row, in its dtype; zeros in blocks of 128 rows whose expert is -1.

    Rows that came through `wire` are quantised here again without loss: E4M3 times 2^e is exact in bfloat16, and of
    elements that are at most 448·2^e and of four significant bits the power-of-two scale is 2^e or less, under which
    they are E4M3 again; a tile whose largest element was rounded down to 224·2^e gets half the scale and twice the
    values. The same holds for gradients of rows.

    A weight multiplies the float32 scales of its row's hidden layer once that is quantised: it costs no pass over
    rows and no rounding, the weighted result is rounded once, to the dtype of rows. Its gradient is read off there,
    so the experts' outputs are not needed. The backward pass has gate and up in FP8 ("experts_gate_up"), and the
    bytes of rows.
    """
    return _expert_ffn(*varying_alike(rows, gate_up, down, weights, block_expert), gradient_tile)


def dispatched_ffn(
    gate_up: Float[Array, "E D 2 F"], down: Float[Array, "E F D"], dispatched: Any, *, gradient_tile: Tile
) -> Float[Array, "M D"]:
    """`expert_ffn` with the arguments of `Functions.expert_ffn`."""
    rows, *others = dispatched[:3]
    return expert_ffn(rows, gate_up, down, *others, gradient_tile=gradient_tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _expert_ffn(rows, gate_up, down, weights, block_expert, gradient_tile):
    return _expert_ffn_forward(rows, gate_up, down, weights, block_expert, gradient_tile)[0]


def _expert_ffn_forward(rows, gate_up, down, weights, block_expert, gradient_tile):
    q = cast_tokens(rows, scale="ue8m0")
    w_in, w_out = (_transposed(w.astype(rows.dtype)) for w in (_joined(gate_up), down))
    joined = grouped_fp8_gemm(q, cast_blocks(w_in), block_expert, out_dtype=rows.dtype)
    saved = named(to_bytes(cast_tokens(joined)), "experts_gate_up")
    hidden = swiglu_cast(joined)
    hidden = QTensor(hidden.values, hidden.scales * weights.astype(jnp.float32)[:, None])
    out = grouped_fp8_gemm(hidden, cast_blocks(w_out), block_expert, out_dtype=rows.dtype)
    return out, (pack(q), gate_up, down, weights, block_expert, saved)


def _expert_ffn_backward(gradient_tile, residuals, d_out):
    payload, gate_up, down, weights, block_expert, saved = residuals
    d_rows = gradient_rows(d_out, tile=(1, 128), scale="ue8m0")
    weight = weights.astype(jnp.float32)[:, None]
    hidden, through_swiglu = jax.vjp(swiglu, dequantize_tiles(from_bytes(saved), tile=(1, 128)))

    w_in, w_out = (w.astype(d_out.dtype) for w in (_joined(gate_up), down))
    d_product = grouped_fp8_gemm(d_rows, cast_blocks(w_out), block_expert, out_dtype=d_out.dtype).astype(jnp.float32)
    d_weights = (d_product * hidden).sum(axis=1).astype(weights.dtype)
    d_hidden = through_swiglu(d_product * weight)[0].astype(d_out.dtype)
    d_down = grouped_fp8_gemm_k(
        cast_tokens((hidden * weight).T), transposed_gradient(d_rows), block_expert, num_groups=down.shape[0]
    )

    to_x = gradient_rows(d_hidden, tile=gradient_tile)
    d_x = grouped_fp8_gemm(to_x, cast_blocks(w_in), block_expert, out_dtype=d_out.dtype)
    d_gate_up = grouped_fp8_gemm_k(
        requantize_transposed(unpack(payload), scale="ue8m0"),
        gradient_columns(d_hidden, tile=gradient_tile),
        block_expert,
        num_groups=down.shape[0],
    )
    d_gate_up = d_gate_up.reshape(gate_up.shape).astype(gate_up.dtype)
    return d_x, d_gate_up, d_down.astype(down.dtype), d_weights, no_gradient(block_expert)


_expert_ffn.defvjp(_expert_ffn_forward, _expert_ffn_backward)


def _joined(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D X"]:
    """Done on either side of the backward pass: a reshaped weight would be saved for it as a copy."""
    return gate_up.reshape(*gate_up.shape[:2], -1)


def _transposed(w: Float[Array, "E A Z"]) -> Float[Array, "E Z A"]:
    return jnp.swapaxes(w, 1, 2)
