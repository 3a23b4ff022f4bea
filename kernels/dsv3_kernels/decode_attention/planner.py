"""The division of a batch's keys among the thread blocks of a GPU, computed on the device from the lengths.

Every sequence is a stretch of a line: a fixed overhead (its queries are loaded, its outputs written), then one unit for
each block of keys. The line is cut into equal parts, one for each group of thread blocks; a cut inside an overhead
moves to the sequence's start. So a part's load exceeds an equal share by at most one block and one overhead, and
everything is arithmetic on arrays of fixed shape: new lengths compile nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

BLOCK_SIZE = 128
"""Keys a block: the two pages that the kernel works on at a time."""

OVERHEAD_BLOCKS = 2
"""What a sequence costs besides its keys, in blocks; FlashMLA counts five of its blocks of 64."""


class Plan(NamedTuple):
    """Which blocks each of G parts works on, and where the partial results of a sequence lie.

    `parts` [G, 5]: first sequence, first block in it, last sequence, end block in it (exclusive), and how many parts
    before this one work on the first sequence. A part without work has last sequence < first sequence.
    `first_part`, `num_splits` [B]: parts `first_part .. first_part + num_splits - 1` work on the sequence; a sequence
    with one split is written to the output itself.
    """

    parts: Int32[Array, "G 5"]
    first_part: Int32[Array, "B"]
    num_splits: Int32[Array, "B"]


def plan_splits(
    seq_lens: Int32[Array, "B"],
    *,
    num_parts: int,
    block_size: int = BLOCK_SIZE,
    overhead: int = OVERHEAD_BLOCKS,
) -> Plan:
    """Cuts the blocks of all sequences into `num_parts` parts of equal load.

    A sequence of length 0 has no block and belongs whole to one part, which writes its output.

    Raises: ValueError for a part count or overhead below 1 (a sequence without length on the line would be lost).
    """
    if num_parts < 1 or overhead < 1:
        raise ValueError(f"num_parts={num_parts} and overhead={overhead} must be at least 1.")
    B = seq_lens.shape[0]
    blocks = (seq_lens + block_size - 1) // block_size
    end = jnp.cumsum(blocks + overhead, dtype=jnp.int32)
    start = end - blocks - overhead
    share, rest = end[-1] // num_parts, end[-1] % num_parts
    index = jnp.arange(num_parts + 1, dtype=jnp.int32)
    cut = index * share + index * rest // num_parts  # the same as index * total // num_parts, which may overflow

    seq = (end[None, :] <= cut[:, None]).sum(1, dtype=jnp.int32)  # B at the very end
    offset = cut - start[jnp.minimum(seq, B - 1)] - overhead
    block = jnp.where(seq < B, jnp.maximum(offset, 0), 0)

    ends_inside = block[1:] > 0
    last_seq = jnp.where(ends_inside, seq[1:], seq[1:] - 1)
    end_block = jnp.where(ends_inside, block[1:], blocks[jnp.clip(last_seq, 0, B - 1)])
    # The part that a sequence starts in: the last one whose cut is not behind its start.
    sequences = jnp.arange(B, dtype=jnp.int32)
    is_before = (seq[None, :-1] < sequences[:, None]) | (
        (seq[None, :-1] == sequences[:, None]) & (block[None, :-1] == 0)
    )
    first_part = is_before.sum(1, dtype=jnp.int32) - 1
    num_splits = 1 + ((seq[None, :] == sequences[:, None]) & (block[None, :] > 0)).sum(1, dtype=jnp.int32)
    split = jnp.where(block[:-1] > 0, index[:-1] - first_part[jnp.minimum(seq[:-1], B - 1)], 0)
    return Plan(jnp.stack([seq[:-1], block[:-1], last_seq, end_block, split], axis=1), first_part, num_splits)
