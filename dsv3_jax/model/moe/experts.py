"""Routed experts in three steps: dispatch to rows, feed-forward on rows, combine (eq. 12)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.typing import Array, Float, Int, Params
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
    """Choices that got no row for want of room; 0 where `max_pairs` is None."""


def routed_experts(
    params: Params, x: Array, ids: Array, weights: Array, *, functions: Any, num_experts: int, first_expert: Any = 0
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """Σ_k weights·FFN_expert(x) in the three steps of `functions`, and the choices dropped. Arguments as in `moe`."""
    with jax.named_scope("dispatch"):
        sent = functions.dispatch(x, ids, weights, num_experts=num_experts)
        in_stack = jnp.where(sent.block_expert < 0, -1, sent.block_expert + first_expert)
        sent = sent._replace(block_expert=in_stack)
    with jax.named_scope("experts"):
        rows = functions.expert_ffn(params["gate_up"], params["down"], sent)
    with jax.named_scope("combine"):
        return functions.combine(rows, sent.plan).reshape(x.shape), sent.dropped


def dispatch(
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    *,
    num_experts: int,
    gather: Callable[..., Array] = gather_rows,
    block_size: int | None = None,
    max_pairs: int | None = None,
) -> Dispatched:
    """Sorts the chosen (token, expert) pairs by expert; an id outside 0..E-1 is no choice.

    `gather(x [N, D], plan)` makes the rows. `block_size`: rows of a block that the feed-forward asks for; None: what
    the number of tokens makes cheap. `max_pairs`: only so many pairs have rows for certain; None: all.
    """
    ids_NK, weights_NK = ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1])
    is_sorted = block_size is not None or max_pairs is not None
    planner = partial(plan_blocks, block_size=block_size, max_pairs=max_pairs) if is_sorted else plan_few
    plan, dropped = planner(ids_NK, num_experts), jnp.int32(0)
    if max_pairs is not None:
        is_choice = (ids_NK >= 0) & (ids_NK < num_experts)
        dropped = (is_choice & (plan.slot_of == plan.token_of.shape[0])).sum(dtype=jnp.int32)
    plan = jax.tree.map(lambda leaf: checkpoint_name(leaf, "experts_plan"), plan)
    rows = gather(x.reshape(-1, x.shape[-1]), plan)
    return Dispatched(rows, row_weights(weights_NK, plan), plan.block_expert, plan, dropped)


def expert_ffn(
    gate_up: Float[Array, "E D 2 F"], down: Float[Array, "E F D"], dispatched: Dispatched
) -> Float[Array, "M D"]:
    """weight · W_down·(silu(W_gate·row) ⊙ (W_up·row)) of each row, by the expert of its block."""
    rows, weights, block_expert, plan, _ = dispatched
    w_in, w_out = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    return rows_ffn(rows, w_in, w_out, weights, block_expert, max_rows=plan.slot_of.shape[0])
