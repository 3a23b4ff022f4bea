"""The routed experts: SwiGLU over rows sorted by expert (report section 2.1.2).

`grouped_matmul` has the signature of a GPU grouped GEMM: contiguous blocks of rows, one expert id a block.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.typing import Array, Float, Int

GroupedLinear = Callable[[Array, Array, Array], Array]


def grouped_matmul_reference(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], block_expert: Int[Array, "M_blocks"]
) -> Float[Array, "M F"]:
    """rows · weights[expert of the row's block], zeros where that is -1: plain twin of `grouped_matmul`."""
    blocks = block_expert.shape[0]
    rows_mbd = rows.reshape(blocks, rows.shape[0] // blocks, rows.shape[1])
    picked_mdf = weights[jnp.maximum(block_expert, 0)] * (block_expert >= 0)[:, None, None].astype(weights.dtype)
    out = jnp.einsum("mbd,mdf->mbf", rows_mbd, picked_mdf, preferred_element_type=jnp.float32)
    return out.reshape(rows.shape[0], weights.shape[2]).astype(rows.dtype)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], block_expert: Int[Array, "M_blocks"]
) -> Float[Array, "M F"]:
    """rows · weights[expert of the row's block], zeros where that is -1.

    Exact for any load. The gradient of `weights` is accumulated in float32.
    """
    blocks = block_expert.shape[0]
    rows_mbd = rows.reshape(blocks, rows.shape[0] // blocks, rows.shape[1])

    def step(index, out):
        def compute(out):
            weight = lax.dynamic_index_in_dim(weights, block_expert[index], 0, keepdims=False)
            block = jnp.matmul(rows_mbd[index], weight, preferred_element_type=jnp.float32)
            return lax.dynamic_update_index_in_dim(out, block.astype(out.dtype), index, 0)

        return lax.cond(block_expert[index] >= 0, compute, lambda out: out, out)

    out = jnp.zeros((blocks, rows_mbd.shape[1], weights.shape[2]), rows.dtype)
    return lax.fori_loop(0, blocks, step, out).reshape(rows.shape[0], weights.shape[2])


def _forward(rows, weights, block_expert):
    return grouped_matmul(rows, weights, block_expert), (rows, weights, block_expert)


def _backward(residuals, d_out):
    rows, weights, block_expert = residuals
    d_rows = grouped_matmul(d_out, weights.swapaxes(1, 2), block_expert)
    blocks = block_expert.shape[0]
    rows_mbd = rows.reshape(blocks, rows.shape[0] // blocks, rows.shape[1])
    d_out_mbf = d_out.reshape(blocks, rows.shape[0] // blocks, d_out.shape[1])

    def step(index, d_weights):
        def compute(d_weights):
            expert = block_expert[index]
            block = jnp.einsum("bd,bf->df", rows_mbd[index], d_out_mbf[index], preferred_element_type=jnp.float32)
            total = lax.dynamic_index_in_dim(d_weights, expert, 0, keepdims=False) + block
            return lax.dynamic_update_index_in_dim(d_weights, total, expert, 0)

        return lax.cond(block_expert[index] >= 0, compute, lambda d_weights: d_weights, d_weights)

    d_weights = lax.fori_loop(0, blocks, step, jnp.zeros(weights.shape, jnp.float32))
    return d_rows, d_weights.astype(weights.dtype), np.zeros(block_expert.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def expert_ffn(
    rows: Float[Array, "M D"],
    params: Mapping[str, Array],
    block_expert: Int[Array, "M_blocks"],
    *,
    grouped_linear: GroupedLinear = grouped_matmul,
) -> Float[Array, "M D"]:
    """(silu(rows · gate) ⊙ (rows · up)) · down, each row with the weights of its block's expert (eq. 12's FFN^(r)).

    `params`: gate_up [E, D, 2, F], down [E, F, D]; they are cast to the dtype of `rows`, the compute dtype.
    """
    E, D, _, F = params["gate_up"].shape
    gate_up = params["gate_up"].astype(rows.dtype).reshape(E, D, 2 * F)
    hidden_M2F = grouped_linear(rows, gate_up, block_expert).reshape(rows.shape[0], 2, F)
    gated_MF = jax.nn.silu(hidden_M2F[:, 0]) * hidden_M2F[:, 1]
    return grouped_linear(gated_MF, params["down"].astype(rows.dtype), block_expert)
