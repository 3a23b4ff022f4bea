"""Routed experts in three steps: dispatch to rows, feed-forward on rows, combine (eq. 12)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.precision import fp8_experts
from dsv3_jax.precision.gradient_tiles import Tile
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import BlockPlan, gather_rows, plan_blocks, plan_few, row_weights
from dsv3_kernels import expert_ffn as rows_ffn


class Dispatched(NamedTuple):
    """Tokens as rows sorted by expert, in blocks that belong to one expert each."""

    rows: Float[Array, "M D"]
    weights: Float[Array, "M"]
    """Float32, what each row's result is multiplied by; 0 where a row is padding."""
    block_expert: Int[Array, "M_blocks"]
    """Which of the weights given to the feed-forward multiply a block; -1 where it is unused."""
    plan: BlockPlan
    """The way back."""
    dropped: Int[Array, ""]
    """Choices that got no row for want of room; 0 on one device."""


def dispatch(
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    *,
    num_experts: int,
    gather: Callable[..., Array] = gather_rows,
    block_size: int | None = None,
) -> Dispatched:
    """Sorts the chosen (token, expert) pairs by expert, without dropping any; an id outside 0..E-1 is no choice.

    `gather(x [N, D], plan)` makes the rows. `block_size`: rows of a block that the feed-forward asks for; None: what
    the number of tokens makes cheap.
    """
    ids_NK, weights_NK = ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1])
    planner = partial(plan_blocks, block_size=block_size) if block_size else plan_few
    plan = planner(ids_NK, num_experts)
    plan = jax.tree.map(lambda leaf: checkpoint_name(leaf, "experts_plan"), plan)
    rows = gather(x.reshape(-1, x.shape[-1]), plan)
    return Dispatched(rows, row_weights(weights_NK, plan), plan.block_expert, plan, jnp.int32(0))


def expert_ffn(
    gate_up: Float[Array, "E D 2 F"], down: Float[Array, "E F D"], dispatched: Dispatched
) -> Float[Array, "M D"]:
    """weight · W_down·(silu(W_gate·row) ⊙ (W_up·row)) of each row, by the expert of its block."""
    rows, weights, block_expert, plan, _ = dispatched
    w_in, w_out = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    return rows_ffn(rows, w_in, w_out, weights, block_expert, max_rows=plan.slot_of.shape[0])


def fp8_expert_ffn(
    gate_up: Float[Array, "E D 2 F"], down: Float[Array, "E F D"], dispatched: Dispatched, *, gradient_tile: Tile
) -> Float[Array, "M D"]:
    """`expert_ffn` with all six matmuls in FP8."""
    rows, *others = dispatched[:3]
    return fp8_experts.expert_ffn(rows, gate_up, down, *others, gradient_tile=gradient_tile)
