"""The experts' feed-forward on rows that lie in blocks of one expert (DeepSeek-V3, the routed part of eq. 12).

One function with a gradient of its own, in two implementations: `loops` where the program is lowered for a CPU,
`grouped` for a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dsv3_kernels import dispatch
from dsv3_kernels.routed_experts import grouped, loops
from dsv3_kernels.routed_experts.rows import no_gradient
from dsv3_kernels.varying import varying_alike

SAVED = "experts_gate_up"
"""The name of what a rematerialisation policy may save: gate and up of every row."""


def expert_ffn(
    rows: ArrayLike,
    gate_up: ArrayLike,
    down: ArrayLike,
    weights: ArrayLike,
    block_expert: ArrayLike,
    *,
    max_rows: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """weight · down · (silu(gate · row) ⊙ (up · row)) of each row, with its block's expert; differentiable.

    Of the M rows the backward pass needs the rows themselves, and gate and up, which are named "experts_gate_up".

    Args:
        rows: [M, D], bfloat16 or float32.
        gate_up: [E, D, 2, F] in the dtype of rows. Experts that no block names are not read, so this may be the stack
            of all layers.
        down: [E, F, D] in the dtype of rows.
        weights: float32, one for each row; zero for padding.
        block_expert: int32, the expert of each block of M / M_blocks rows, blocks of one expert side by side; -1 skips
            a block.
        max_rows: no expert has more rows than this, such as the number of tokens; None if unknown. It saves compile
            time on CPUs and padding on GPUs.
        implementation: None for the fastest on the target, or "reference", "xla", "pallas".
    Returns: [M, D]; rows of skipped blocks are zeros.
    Raises:
        ValueError: shapes or dtypes that do not fit, with how to fix them.
        NotImplementedError: an implementation that cannot serve these inputs or this target.
    """
    rows, gate_up, down, weights, block_expert = map(jnp.asarray, (rows, gate_up, down, weights, block_expert))
    _check(rows, gate_up, down, weights, block_expert)
    limit = rows.shape[0] if max_rows is None else min(max_rows, rows.shape[0])
    return _ffn(implementation, limit, *varying_alike(rows, gate_up, down, weights, block_expert))


def _refuses(rows: Array, *others: Any, **static: Any) -> str | None:
    """The grouped matmuls of a Hopper GPU are of bfloat16; others are XLA's."""
    return None if rows.dtype == jnp.bfloat16 else f"takes bfloat16, not {rows.dtype}: compute in that"


def _op(name: str, function: str, axes: str, **static: Any) -> dispatch.Op:
    of_gpu, of_cpu = getattr(grouped, function), getattr(loops, function)
    return dispatch.Op(
        name,
        reference=functools.partial(of_gpu, **static, implementation="reference"),
        xla=functools.partial(of_cpu, **static),
        kernel=functools.partial(of_gpu, **static),
        xla_gpu=functools.partial(of_gpu, **static),
        refuses=_refuses,
        axes=axes,
        no_gradient="{op} is part of dsv3_kernels.expert_ffn, whose gradient has none itself.",
    )


ARGUMENTS = "md edgf efd m m"
FORWARD = _op("expert_ffn", "forward", f"{ARGUMENTS} -> md", saves_hidden=False)
FORWARD_SAVING = _op("expert_ffn_saving", "forward", f"{ARGUMENTS} -> md mf", saves_hidden=True)
BACKWARD = _op("expert_ffn_backward", "backward", f"{ARGUMENTS} mf md -> md edgf efd m")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ffn(implementation, max_rows, *arrays):
    return dispatch.run(FORWARD, implementation, *arrays, max_rows=max_rows)[0]


def _ffn_forward(implementation, max_rows, *arrays):
    out, hidden = dispatch.run(FORWARD_SAVING, implementation, *arrays, max_rows=max_rows)
    return out, (*arrays, checkpoint_name(hidden, SAVED))


def _ffn_backward(implementation, max_rows, residuals, d_out):
    gradients = dispatch.run(BACKWARD, implementation, *residuals, d_out, max_rows=max_rows)
    return *gradients, no_gradient(residuals[4])


_ffn.defvjp(_ffn_forward, _ffn_backward)


def _check(rows: Array, gate_up: Array, down: Array, weights: Array, block_expert: Array) -> None:
    D, (E, F) = rows.shape[-1], down.shape[:2]
    if rows.ndim != 2 or gate_up.shape != (E, D, 2, F) or down.shape != (E, F, D):
        raise ValueError(
            f"expert_ffn: rows {rows.shape}, gate_up {gate_up.shape} and down {down.shape} must be [M, D], "
            "[E, D, 2, F] and [E, F, D]; stack gates before ups on axis 2."
        )
    if rows.dtype not in (jnp.bfloat16, jnp.float32) or not rows.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"expert_ffn: rows are {rows.dtype}, gate_up {gate_up.dtype} and down {down.dtype}, and must all be "
            "bfloat16 or all float32; cast them."
        )
    M = rows.shape[0]
    if weights.shape != (M,) or weights.dtype != jnp.float32:
        raise ValueError(
            f"expert_ffn: weights are {weights.dtype}{list(weights.shape)} and must be float32[{M}], one for each row; "
            "row_weights(weights, plan) makes them."
        )
    if block_expert.ndim != 1 or block_expert.dtype != jnp.int32 or M % max(block_expert.size, 1):
        raise ValueError(
            f"expert_ffn: block_expert is {block_expert.dtype}{list(block_expert.shape)} and must be int32 with one "
            f"expert for each of equal blocks of the M={M} rows; plan_blocks makes it."
        )
