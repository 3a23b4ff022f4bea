"""The routed experts as products of all rows at once, grouped by expert: what a GPU runs.

The same sums as in `loops`, which stay in a CPU's cache. Here every step goes over all M rows: a gather of
tokens, two grouped products, and one more product of each kind for each gradient. Weights are read as they are stored.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.model.moe.dispatch import BlockPlan, gather_rows, plan_blocks, sum_pairs, weight_of_row
from dsv3_jax.precision.plain_linear import swiglu
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import grouped_matmul, grouped_matmul_k

TALL = 64
"""Rows of a block that the grouped products of a GPU take at least, or a multiple."""


def forward(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "N K"],
    plan: BlockPlan,
    *,
    keeps_hidden: bool,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """Σ_k weight · FFN_expert(x) [N, D]; if asked, also gate and up of every row [M, 2F], for `backward`."""
    tall = _in_tall_blocks(plan, down.shape[0])
    hidden = grouped_matmul(gather_rows(x, tall), gate_up, tall.block_expert, implementation=implementation)
    weighted = swiglu(hidden.astype(jnp.float32)) * weight_of_row(weights, tall)[:, None]
    out = grouped_matmul(weighted.astype(x.dtype), down, tall.block_expert, implementation=implementation)
    return sum_pairs(out, tall), *([_moved(hidden, tall, plan)] if keeps_hidden else [])


def backward(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "N K"],
    plan: BlockPlan,
    hidden: Float[Array, "M F2"],
    d_out: Float[Array, "N D"],
    *,
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The gradients of x, gate_up, down and weights.

    The gradient of a weight is read off where it multiplies the hidden product, so no product is made again.
    """
    E = down.shape[0]
    tall = _in_tall_blocks(plan, E)
    weight, d_rows = weight_of_row(weights, tall)[:, None], gather_rows(d_out, tall)
    product, through_swiglu = jax.vjp(swiglu, _moved(hidden, plan, tall).astype(jnp.float32))
    d_weighted = grouped_matmul(d_rows, down, tall.block_expert, transposed=True, implementation=implementation)
    d_weighted = d_weighted.astype(jnp.float32)
    d_weights = (d_weighted * product).sum(axis=1)[tall.slot_of].astype(weights.dtype)
    d_hidden = through_swiglu(d_weighted * weight)[0].astype(x.dtype)
    d_x = grouped_matmul(d_hidden, gate_up, tall.block_expert, transposed=True, implementation=implementation)

    def weight_gradient(rows: Array, d_product: Array, like: Array) -> Array:
        return grouped_matmul_k(
            rows, d_product, tall.block_expert, num_groups=E, out_dtype=like.dtype, implementation=implementation
        )

    d_gate_up = weight_gradient(gather_rows(x, tall), d_hidden, gate_up)
    d_down = weight_gradient((product * weight).astype(x.dtype), d_rows, down)
    return sum_pairs(d_x, tall), d_gate_up, d_down, d_weights


def few_tokens(
    gate_up: Float[Array, "LE D F2"],
    down: Float[Array, "LE F D"],
    first: Int[Array, ""],
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    num_experts: int,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """The same with the experts first, first + 1, ... of a stack of all layers, of which the rest is not read."""
    plan = plan_blocks(ids, num_experts, block_size=TALL)
    in_stack = jnp.where(plan.block_expert < 0, -1, plan.block_expert + first)
    plan = plan._replace(block_expert=in_stack.astype(jnp.int32))
    return forward(x, gate_up, down, weights, plan, keeps_hidden=False, implementation=implementation)[0]


def _in_tall_blocks(plan: BlockPlan, num_experts: int) -> BlockPlan:
    """The plan itself, or one for the same pairs in blocks of 64 rows: few rows an expert are planned in lower ones."""
    block_size = plan.token_of.shape[0] // plan.block_expert.shape[0]
    if block_size % TALL == 0:
        return plan
    ids = plan.block_expert[plan.slot_of // block_size]
    return plan_blocks(ids, num_experts, block_size=TALL)


def _moved(rows: Float[Array, "_ X"], source: BlockPlan, target: BlockPlan) -> Float[Array, "_ X"]:
    """The rows of one plan where another plan of the same pairs has them, zeros where that is padding."""
    if source is target:
        return rows
    slot = source.slot_of.reshape(-1).at[target.pair_of].get(mode="fill", fill_value=rows.shape[0])
    return rows.at[slot].get(mode="fill", fill_value=0)
