"""The division of a batch's keys among the thread blocks of a GPU, computed on the device from the lengths.

Every sequence is a stretch of a line: a fixed overhead (its queries are loaded, its outputs written), then one unit for
each block of keys. The line is cut into equal parts, one for each group of thread blocks; a cut inside an overhead
moves to the sequence's start. So a part's load exceeds an equal share by at most one block and one overhead, and
everything is arithmetic on arrays of fixed shape: new lengths compile nothing.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

BLOCK_SIZE = 128
"""Keys a block: the two pages that the kernel works on at a time."""

OVERHEAD_BLOCKS = 2
"""What a sequence costs besides its keys, in blocks; FlashMLA counts five of its blocks of 64."""

MAX_LENGTH = 2**24
"""Tokens of a sequence that a plan counts: were a length anything, sums of thousands of them would still be right."""

ROWS = 64
"""Query rows of a thread block: the M of one tensor core instruction."""


class Plan(NamedTuple):
    """Which blocks of keys each of G parts works on; what `plan_decode` returns and `mla_decode` takes.

    `seq_lens` [B]: the lengths that were divided.
    `parts` [G, 5]: first sequence, first block in it, last sequence, end block in it (exclusive), and how many parts
    work on the last sequence where it begins in this part and does not end there, else 1. A part without work has last
    sequence < first sequence. A sequence that is split among parts is the last of the part where it begins.
    """

    seq_lens: Int32[Array, "B"]
    parts: Int32[Array, "G 5"]


def num_parts(num_sms: int, *, num_queries: int, num_heads: int) -> int:
    """Into how many parts the keys are divided, so that the blocks of query rows of all parts fill the GPU once.

    Raises: ValueError for a number that is not a positive integer.
    """
    for name, number in (("num_sms", num_sms), ("num_queries", num_queries), ("num_heads", num_heads)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be a positive integer.")
    return max(1, num_sms // -(-num_queries * num_heads // ROWS))


def num_blocks(length: Any) -> Any:
    """Blocks of keys of sequences, whose lengths are cut to 0 .. MAX_LENGTH."""
    return lax.div(jnp.clip(length, 0, MAX_LENGTH) + (BLOCK_SIZE - 1), jnp.int32(BLOCK_SIZE))


def cut_at(index: Any, total: Any, count: int) -> Any:
    """The place of cut `index` of a line of `total` in `count` parts: index total // count, which may overflow."""
    parts = jnp.int32(count)
    return index * lax.div(total, parts) + lax.div(index * lax.rem(total, parts), parts)


def plan_splits(seq_lens: Int32[Array, "B"], *, num_parts: int) -> Plan:
    """Cuts the blocks of all sequences into `num_parts` parts of equal load.

    A sequence of length 0 has no block and belongs whole to one part, which writes its output.
    """
    B = seq_lens.shape[0]
    blocks = num_blocks(seq_lens)
    end = jnp.cumsum(blocks + OVERHEAD_BLOCKS, dtype=jnp.int32)
    start = end - blocks - OVERHEAD_BLOCKS
    cut = cut_at(jnp.arange(num_parts + 1, dtype=jnp.int32), end[-1], num_parts)

    seq = (end[None, :] <= cut[:, None]).sum(1, dtype=jnp.int32)  # B at the very end
    offset = cut - start[jnp.minimum(seq, B - 1)] - OVERHEAD_BLOCKS
    block = jnp.where(seq < B, jnp.maximum(offset, 0), 0)

    ends_inside = block[1:] > 0
    last_seq = jnp.where(ends_inside, seq[1:], seq[1:] - 1)
    end_block = jnp.where(ends_inside, block[1:], jnp.where(last_seq < 0, 0, blocks[jnp.maximum(last_seq, 0)]))
    begins_here = (seq[:-1] < seq[1:]) | (block[:-1] == 0)
    cuts_inside = ((seq[None, :] == last_seq[:, None]) & (block[None, :] > 0)).sum(1, dtype=jnp.int32)
    num_splits = jnp.where(ends_inside & begins_here, 1 + cuts_inside, 1)
    return Plan(seq_lens, jnp.stack([seq[:-1], block[:-1], last_seq, end_block, num_splits], axis=1))
