"""A layer of V3's routed experts, forward and backward, compiled as a whole for an H100.

Other cases call kernels themselves. This one calls public ops with `implementation=None` in a process without a GPU:
the target decides that the program holds the kernels.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float

from dsv3_kernels import (
    QTensor,
    cast_blocks,
    cast_tokens,
    grouped_fp8_gemm,
    grouped_fp8_gemm_k,
    requantize_transposed,
    swiglu_cast,
)
from dsv3_kernels.aot import hlo
from dsv3_kernels.aot.case import FP8_MMA, AotCase

ROWS, MODEL, HIDDEN, EXPERTS = 4096, 7168, 2048, 8
"""Rows after dispatch, widths of DeepSeek-V3, experts of one device."""
NUM_KERNELS = 16
"""6 matmuls, 6 casts of activations, gradients and weights, 4 transpositions."""


def aot_cases() -> list[AotCase]:
    """The layer, with each expert given an equal share of the rows."""
    row = jax.ShapeDtypeStruct((ROWS, MODEL), jnp.bfloat16)
    gate_up = jax.ShapeDtypeStruct((EXPERTS, 2 * HIDDEN, MODEL), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((EXPERTS, MODEL, HIDDEN), jnp.bfloat16)
    return [
        AotCase(
            f"moe_layer {ROWS}x{MODEL}x{HIDDEN}",
            train_experts,
            (row, row, gate_up, down),
            (FP8_MMA,),
            expect=find_faults,
        )
    ]


def train_experts(
    x: BFloat16[Array, "M D"],
    d_out: BFloat16[Array, "M D"],
    gate_up: BFloat16[Array, "E F2 D"],
    down: BFloat16[Array, "E D F"],
) -> tuple[BFloat16[Array, "M D"], BFloat16[Array, "M D"], Float[Array, "E F2 D"], Float[Array, "E D F"]]:
    """The experts' outputs for rows sorted by expert, and the gradients of the rows and of both weights."""
    num_experts = down.shape[0]
    experts = np.repeat(np.arange(num_experts, dtype=np.int32), x.shape[0] // 128 // num_experts)
    rows, gate_up_blocks, down_blocks = cast_tokens(x, scale="ue8m0"), cast_blocks(gate_up), cast_blocks(down)
    hidden = grouped_fp8_gemm(rows, gate_up_blocks, experts)
    active = swiglu_cast(hidden, scale="ue8m0")
    out = grouped_fp8_gemm(active, down_blocks, experts)

    d_rows = cast_tokens(d_out, scale="ue8m0")
    d_active = grouped_fp8_gemm(d_rows, _transposed(down_blocks), experts)
    d_hidden = cast_tokens(jax.vjp(_swiglu, hidden)[1](d_active)[0], scale="ue8m0")
    d_x = grouped_fp8_gemm(d_hidden, _transposed(gate_up_blocks), experts)
    rows, active, d_rows, d_hidden = map(requantize_transposed, (rows, active, d_rows, d_hidden))
    d_gate_up = grouped_fp8_gemm_k(d_hidden, rows, experts, num_groups=num_experts)
    d_down = grouped_fp8_gemm_k(d_rows, active, experts, num_groups=num_experts)
    return out, d_x, d_gate_up, d_down


def find_faults(program: str) -> list[str]:
    """Whether the layer holds other kernels than its own, or multiplies outside of them."""
    faults = []
    launches = hlo.launches(program)
    if launches[hlo.KERNEL] != NUM_KERNELS:
        faults.append(f"has {launches[hlo.KERNEL]} kernels instead of {NUM_KERNELS}; XLA does the work of the others")
    if products := re.findall(
        r'%\S+ = \S+ (?:dot|convolution)\(|custom_call_target="(?:__cublas|__cudnn)[^"]*"', program
    ):
        faults.append(f"multiplies outside its kernels: {products[0]}")
    return faults


def _transposed(w: QTensor) -> QTensor:
    """Blocks of 128x128 are those of the transpose."""
    return QTensor(*(jnp.swapaxes(part, 1, 2) for part in w))


def _swiglu(gate_up: BFloat16[Array, "M F2"]) -> BFloat16[Array, "M F"]:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
