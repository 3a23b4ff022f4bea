"""Where each (token, choice) pair goes: rows in blocks, each block of one expert, without dropping any pair.

All shapes are static. Whatever the layout, whoever gathers, multiplies or sums the rows sees the same `BlockPlan`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FEW_TOKENS = 8
"""Up to this many tokens, blocks of all tokens cost less on a CPU than sorting."""


class BlockPlan(NamedTuple):
    """N tokens' K pairs among M rows; -1, M, N and N·K mean none.

    `slot_of` row of each pair, M where it has none · `token_of` token of each row, N where the row is padding ·
    `pair_of` index n·K + k of each row, N·K where padding · `block_expert` expert of each block, -1 where unused.
    """

    slot_of: Int[Array, "N K"]
    token_of: Int[Array, "M"]
    pair_of: Int[Array, "M"]
    block_expert: Int[Array, "M_blocks"]


def block_size_for(num_pairs: int, num_experts: int) -> int:
    """A block size, 8 to 64 rows, that wastes little of an average expert's rows and leaves few blocks to plan."""
    size = 64
    while size > 8 and size * num_experts * 4 > num_pairs:
        size //= 2
    return size


def num_blocks(num_pairs: int, num_experts: int, block_size: int) -> int:
    """Blocks that suffice for any load: each expert that got a token wastes less than one."""
    return num_pairs // block_size + min(num_experts, num_pairs)


def plan_blocks(
    ids: Int[Array, "N K"], num_experts: int, *, block_size: int | None = None, max_pairs: int | None = None
) -> BlockPlan:
    """Lays the pairs out by expert, in token order within an expert, whose unused rows are its last.

    Args:
        ids: the expert of each pair. One outside 0..E-1 is no choice: it gets no row.
        num_experts: E.
        block_size: rows of a block; None for `block_size_for`.
        max_pairs: at most so many pairs choose an expert, where the caller knows: it bounds the rows. Pairs for which
            no row is left get none.
    Returns: a plan of M = block_size · `num_blocks(...)` rows. Blocks of one expert are neighbours, unused ones last.
    """
    N, K = ids.shape
    pairs = N * K if max_pairs is None else min(max_pairs, N * K)
    block_size = block_size or block_size_for(pairs, num_experts)
    blocks = num_blocks(pairs, num_experts, block_size)
    M = blocks * block_size
    expert_of_pair = jnp.where(_is_choice(ids, num_experts), ids, num_experts).reshape(N * K).astype(jnp.int32)
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
    row_expert = jnp.repeat(safe_expert, block_size, total_repeat_length=M)
    offset = jnp.arange(M, dtype=jnp.int32) - row_start[row_expert]
    is_used = offset < load[row_expert]
    position = jnp.clip((last - load)[row_expert] + offset, 0, N * K - 1)
    pair_of = jnp.where(is_used, pair_in_order[position], N * K)

    own = jnp.minimum(expert_in_order, num_experts - 1)
    slot_in_order = row_start[own] + jnp.arange(N * K, dtype=jnp.int32) - (last - load)[own]
    has_row = (expert_in_order < num_experts) & (slot_in_order < M)
    slot_in_order = jnp.where(has_row, slot_in_order, M)
    return BlockPlan(
        slot_of=slot_in_order[jnp.argsort(pair_in_order)].reshape(N, K),
        token_of=jnp.where(is_used, pair_of // K, N),
        pair_of=pair_of,
        block_expert=jnp.where(block_expert < num_experts, block_expert, -1),
    )


def plan_few(ids: Int[Array, "N K"], num_experts: int) -> BlockPlan:
    """As `plan_blocks`, for the few tokens of a decoding step, whose cost is reading each used expert's weights once.

    Up to `FEW_TOKENS` tokens nothing is sorted: a block of N rows is an expert that some token chose, and its row n is
    token n, or padding where that chose others. A token's experts must differ. More tokens are sorted.
    """
    N, K = ids.shape
    if N > FEW_TOKENS:
        return plan_blocks(ids, num_experts)
    if N == 1:
        return _plan_one(ids, num_experts)
    blocks = min(num_experts, N * K)
    experts, token_N = jnp.arange(num_experts, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)
    is_used = (ids[:, :, None] == experts[None, None, :]).any(axis=(0, 1))
    block_of = jnp.cumsum(is_used, dtype=jnp.int32) - 1
    block_expert = jnp.argsort(~is_used, stable=True)[:blocks].astype(jnp.int32)
    block_expert = jnp.where(is_used[block_expert], block_expert, -1)
    slot_NK = block_of[jnp.clip(ids, 0, num_experts - 1)] * N + token_N[:, None]

    is_own_BNK = (ids[None, :, :] == block_expert[:, None, None]) & (block_expert >= 0)[:, None, None]
    is_row_BN, choice_BN = is_own_BNK.any(axis=2), jnp.argmax(is_own_BNK, axis=2).astype(jnp.int32)
    return BlockPlan(
        slot_of=jnp.where(_is_choice(ids, num_experts), slot_NK, blocks * N),
        token_of=jnp.where(is_row_BN, token_N[None, :], N).reshape(-1),
        pair_of=jnp.where(is_row_BN, token_N[None, :] * K + choice_BN, N * K).reshape(-1),
        block_expert=block_expert,
    )


def _plan_one(ids: Int[Array, "1 K"], num_experts: int) -> BlockPlan:
    """A row and a block for each expert of one token, in its own order: nothing to look up."""
    pair, is_choice = jnp.arange(ids.shape[1], dtype=jnp.int32), _is_choice(ids, num_experts)[0]
    own = jnp.where(is_choice, pair, ids.shape[1])
    block_expert = jnp.where(is_choice, ids[0].astype(jnp.int32), -1)
    return BlockPlan(own[None], jnp.where(is_choice, 0, 1).astype(jnp.int32), own, block_expert)


def _is_choice(ids: Int[Array, "N K"], num_experts: int) -> Bool[Array, "N K"]:
    return (ids >= 0) & (ids < num_experts)
