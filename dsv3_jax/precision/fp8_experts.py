"""The routed experts in FP8: rows sorted by expert in blocks of 128, three grouped products in each direction.

A token is quantised once, with power-of-two scales, then gathered to the rows of its experts: the payload that an
exchange between devices sends. So is the gradient of the result on its way back. Rows come home in the compute dtype
and are weighted and summed in float32 (report sections 3.3.2 and 3.3.3).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.precision.gradient_tiles import Tile, gradient_columns, gradient_rows, turned_gradient
from dsv3_jax.precision.kept import from_bytes, keep, to_bytes
from dsv3_jax.precision.payload import gather, pack, to_payload, unpack
from dsv3_jax.precision.plain import swiglu
from dsv3_jax.typing import Array, DType, Float
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
from dsv3_kernels.varying import varying_alike

BLOCK_ROWS = 128
"""Rows of a block of the plan: what a grouped GEMM asks for."""


def routed_experts(
    x: Float[Array, "N D"],
    params: Mapping[str, Array],
    weights: Float[Array, "N K"],
    plan: Any,
    *,
    dtype: DType,
    gradient_tile: Tile = (1, 128),
) -> Float[Array, "N D"]:
    """Σ_k weight · FFN_expert(x) for the pairs that `plan` laid out in blocks of 128 rows.

    `params`: gate_up [E, D, 2, F], down [E, F, D]. Of the M rows the backward pass keeps gate and up in FP8; of the
    N tokens, their payload. The gradient of a weight is read off where it multiplies the hidden product, so the
    experts' outputs are not needed.
    """
    arguments = varying_alike(x.astype(dtype), params["gate_up"], params["down"], weights, plan)
    return _routed(*arguments, gradient_tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _routed(x, gate_up, down, weights, plan, gradient_tile):
    return _routed_forward(x, gate_up, down, weights, plan, gradient_tile)[0]


def _routed_forward(x, gate_up, down, weights, plan, gradient_tile):
    payload = to_payload(x)
    rows = unpack(gather(payload, plan.token_of))
    hidden = grouped_fp8_gemm(rows, cast_blocks(_turned(_joined(gate_up))), plan.block_expert, out_dtype=x.dtype)
    out = grouped_fp8_gemm(swiglu_cast(hidden), cast_blocks(_turned(down)), plan.block_expert, out_dtype=x.dtype)
    kept = keep(to_bytes(cast_tokens(hidden)))
    return _sum_pairs(out, plan, weights), (payload, gate_up, down, weights, plan, kept)


def _routed_backward(gradient_tile, residuals, d_out):
    payload, gate_up, down, weights, plan, kept = residuals
    experts, num_experts = plan.block_expert, down.shape[0]
    d_rows = unpack(gather(pack(gradient_rows(d_out, tile=gradient_tile, scale="ue8m0")), plan.token_of))
    weight = weights.astype(jnp.float32).reshape(-1).at[plan.pair_of].get(mode="fill", fill_value=0)
    hidden, through_swiglu = jax.vjp(swiglu, dequantize_tiles(from_bytes(kept), tile=(1, 128)))

    d_product = grouped_fp8_gemm(d_rows, cast_blocks(down), experts, out_dtype=d_out.dtype).astype(jnp.float32)
    d_weights = (d_product * hidden).sum(axis=1)[plan.slot_of].astype(weights.dtype)
    d_hidden = through_swiglu(d_product * weight[:, None])[0].astype(d_out.dtype)
    d_down = _weight_gradient(cast_tokens((hidden * weight[:, None]).T), turned_gradient(d_rows), experts, num_experts)

    to_x = gradient_rows(d_hidden, tile=gradient_tile)
    d_x = grouped_fp8_gemm(to_x, cast_blocks(_joined(gate_up)), experts, out_dtype=d_out.dtype)
    rows = unpack(gather(payload, plan.token_of))
    d_gate_up = _weight_gradient(
        requantize_transposed(rows, scale="ue8m0"), gradient_columns(d_hidden, tile=gradient_tile), experts, num_experts
    )
    d_plan = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), plan)
    d_gate_up = d_gate_up.reshape(gate_up.shape).astype(gate_up.dtype)
    return _sum_pairs(d_x, plan), d_gate_up, d_down.astype(down.dtype), d_weights, d_plan


_routed.defvjp(_routed_forward, _routed_backward)


def _weight_gradient(a: QTensor, b: QTensor, experts: Array, num_experts: int) -> Float[Array, "E A Z"]:
    return grouped_fp8_gemm_k(a, b, experts, num_groups=num_experts)


def _sum_pairs(rows: Float[Array, "M D"], plan: Any, weights: Array | None = None) -> Float[Array, "N D"]:
    """Σ_k weights[n, k] · rows[slot_of[n, k]] in float32, in the dtype of `rows`; without weights, the plain sum."""
    total = jnp.zeros((), jnp.float32)
    for k in range(plan.slot_of.shape[1]):
        row = rows[plan.slot_of[:, k]].astype(jnp.float32)
        total = total + (row if weights is None else row * weights[:, k, None].astype(jnp.float32))
    return total.astype(rows.dtype)


def _joined(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D X"]:
    """Done on either side of the backward pass: a reshaped weight would be kept for it as a copy."""
    return gate_up.reshape(*gate_up.shape[:2], -1)


def _turned(w: Float[Array, "E A Z"]) -> Float[Array, "E Z A"]:
    return jnp.swapaxes(w, 1, 2)
