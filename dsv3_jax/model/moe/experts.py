"""The routed experts: SwiGLU over rows sorted by expert (report section 2.1.2).

One function with a gradient of its own, in two implementations of one op: `loops` where the program is lowered for a
CPU, `grouped` for a GPU.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.model.moe import grouped, loops
from dsv3_jax.model.moe.dispatch import BlockPlan, no_gradient
from dsv3_jax.typing import Array, Float
from dsv3_kernels import dispatch
from dsv3_kernels.varying import varying_alike


def _refuses(x: Array, *others: Any, **static: Any) -> str | None:
    """The grouped products of a Hopper GPU are of bfloat16; others are XLA's."""
    return None if x.dtype == jnp.bfloat16 else f"takes bfloat16, not {x.dtype}: compute in that"


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
        no_gradient="{op} is part of dsv3_jax.model.moe.experts.routed_ffn, whose gradient has none itself.",
    )


ARGUMENTS = "nd edf efd nk nk m m m e"
"""Axes of tokens, weights, and the arrays of a plan."""
FORWARD = _op("routed_experts", "forward", f"{ARGUMENTS} -> nd", keeps_hidden=False)
FORWARD_KEEPING = _op("routed_experts_keeping", "forward", f"{ARGUMENTS} -> nd mf", keeps_hidden=True)
BACKWARD = _op("routed_experts_backward", "backward", f"{ARGUMENTS} mf nd -> nd edf efd nk")


def routed_ffn(
    x: Float[Array, "N D"],
    params: Mapping[str, Array],
    weights: Float[Array, "N K"],
    plan: BlockPlan,
) -> Float[Array, "N D"]:
    """Σ_k weight · down · (silu(gate · x) ⊙ (up · x)) of the pairs that `plan` laid out: the routed part of eq. 12.

    `params`: gate_up [E, D, 2, F], down [E, F, D], cast to the dtype of x, the compute dtype. Of the M rows the
    backward pass keeps gate and up only: tokens are gathered again, products made again, and the gradient of a weight
    is read off where it multiplies the hidden product, so the experts' outputs are not needed.
    """
    gate_up = params["gate_up"].astype(x.dtype)
    gate_up = gate_up.reshape(*gate_up.shape[:2], -1)
    return _routed(*varying_alike(x, gate_up, params["down"].astype(x.dtype), weights, plan))


@jax.custom_vjp
def _routed(x, gate_up, down, weights, plan):
    return dispatch.run(FORWARD, None, x, gate_up, down, weights, plan)[0]


def _routed_forward(x, gate_up, down, weights, plan):
    out, hidden = dispatch.run(FORWARD_KEEPING, None, x, gate_up, down, weights, plan)
    return out, (x, gate_up, down, weights, plan, checkpoint_name(hidden, "kept"))


def _routed_backward(residuals, d_out):
    return *dispatch.run(BACKWARD, None, *residuals, d_out), no_gradient(residuals[4])


_routed.defvjp(_routed_forward, _routed_backward)
