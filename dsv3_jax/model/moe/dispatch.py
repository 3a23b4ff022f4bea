"""Sorting of tokens by expert into blocks of rows, without dropping any.

Every expert's rows are contiguous and padded to whole blocks, so each block belongs to one expert and a grouped
matmul needs one expert id a block. All shapes are static; all data movement, forward and backward, is a gather.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.typing import Array, Float, Int


class BlockPlan(NamedTuple):
    """Where each (token, choice) pair goes, among M rows in blocks; an expert's unused rows are its last.

    `slot_of` row of each pair · `token_of` token of each row, N where the row is padding · `pair_of` index n·K + k of
    each row, N·K where padding · `block_expert` expert of each block, -1 where unused · `load` tokens of each expert.
    """

    slot_of: Int[Array, "N K"]
    token_of: Int[Array, "M"]
    pair_of: Int[Array, "M"]
    block_expert: Int[Array, "M_blocks"]
    load: Int[Array, "E"]


def block_size_for(num_pairs: int, num_experts: int) -> int:
    """A block size, 8 to 64 rows, that wastes little of an average expert's rows and leaves few blocks to plan."""
    size = 64
    while size > 8 and size * num_experts * 4 > num_pairs:
        size //= 2
    return size


def num_blocks(num_pairs: int, num_experts: int, block_size: int) -> int:
    """Blocks that suffice for any load: each expert that got a token wastes less than one."""
    return num_pairs // block_size + min(num_experts, num_pairs)


def plan_blocks(ids: Int[Array, "N K"], num_experts: int, *, block_size: int) -> BlockPlan:
    """Lays the chosen pairs out by expert, in token order within an expert. M = block_size · `num_blocks(...)`."""
    N, K = ids.shape
    blocks = num_blocks(N * K, num_experts, block_size)
    expert_of_pair = ids.reshape(N * K).astype(jnp.int32)
    pair_in_order = jnp.argsort(expert_of_pair, stable=True).astype(jnp.int32)
    expert_in_order = expert_of_pair[pair_in_order]
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    last = jnp.searchsorted(expert_in_order, experts, side="right", method="scan_unrolled").astype(jnp.int32)
    load = jnp.diff(last, prepend=jnp.zeros((1,), jnp.int32))
    used_blocks = (load + (block_size - 1)) // block_size
    block_end = jnp.cumsum(used_blocks, dtype=jnp.int32)
    row_start = (block_end - used_blocks) * block_size

    block_expert = jnp.searchsorted(
        block_end, jnp.arange(blocks, dtype=jnp.int32), side="right", method="scan_unrolled"
    ).astype(jnp.int32)
    safe_expert = jnp.minimum(block_expert, num_experts - 1)
    row_expert = jnp.repeat(safe_expert, block_size, total_repeat_length=blocks * block_size)
    offset = jnp.arange(blocks * block_size, dtype=jnp.int32) - row_start[row_expert]
    is_used = offset < load[row_expert]
    position = jnp.clip((last - load)[row_expert] + offset, 0, N * K - 1)
    pair_of = jnp.where(is_used, pair_in_order[position], N * K)

    slot_in_order = row_start[expert_in_order] + jnp.arange(N * K, dtype=jnp.int32) - (last - load)[expert_in_order]
    slot_of = slot_in_order[jnp.argsort(pair_in_order)].reshape(N, K)
    return BlockPlan(
        slot_of=slot_of,
        token_of=jnp.where(is_used, pair_of // K, N),
        pair_of=pair_of,
        block_expert=jnp.where(block_expert < num_experts, block_expert, -1),
        load=load,
    )


@jax.custom_vjp
def gather_rows(x: Float[Array, "N D"], plan: BlockPlan) -> Float[Array, "M D"]:
    """Row m of the result is the token of row m, zeros where the row is padding."""
    return x.at[plan.token_of].get(mode="fill", fill_value=0)


def _gather_rows_forward(x, plan):
    return gather_rows(x, plan), plan


def _gather_rows_backward(plan, d_rows):
    return sum_pairs(d_rows, plan), no_gradient(plan)


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@jax.custom_vjp
def combine_rows(rows: Float[Array, "M D"], weights: Float[Array, "N K"], plan: BlockPlan) -> Float[Array, "N D"]:
    """Σ_k weights[n, k] · rows[slot_of[n, k]], summed in float32, in the dtype of `rows`."""
    pairs = zip(plan.slot_of.T, weights.astype(jnp.float32).T, strict=True)
    weighted = [rows[slot_N].astype(jnp.float32) * weight_N[:, None] for slot_N, weight_N in pairs]
    return functools.reduce(jnp.add, weighted).astype(rows.dtype)


def _combine_rows_forward(rows, weights, plan):
    return combine_rows(rows, weights, plan), (rows, weights, plan)


def _combine_rows_backward(residuals, d_out):
    rows, weights, plan = residuals
    d_out_wide = d_out.astype(jnp.float32)
    d_rows = d_out_wide.at[plan.token_of].get(mode="fill", fill_value=0) * weight_of_row(weights, plan)[:, None]
    d_weights = jnp.stack(
        [(rows[slot_N].astype(jnp.float32) * d_out_wide).sum(axis=1) for slot_N in plan.slot_of.T], axis=1
    )
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), no_gradient(plan)


combine_rows.defvjp(_combine_rows_forward, _combine_rows_backward)


def sum_pairs(rows: Float[Array, "M D"], plan: BlockPlan) -> Float[Array, "N D"]:
    """Σ_k rows[slot_of[n, k]], summed in float32, in the dtype of `rows`. Not differentiable on its own."""
    total = functools.reduce(jnp.add, [rows[slot_N].astype(jnp.float32) for slot_N in plan.slot_of.T])
    return total.astype(rows.dtype)


def weight_of_row(weights: Float[Array, "N K"], plan: BlockPlan) -> Float[Array, "M"]:
    """The weight of each row's pair, zero where the row is padding."""
    return weights.astype(jnp.float32).reshape(-1).at[plan.pair_of].get(mode="fill", fill_value=0)


def no_gradient(plan: BlockPlan) -> BlockPlan:
    """What a `jax.custom_vjp` returns for a plan, which is of integers."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), plan)
