"""Shared memory of the decoding kernel, and what a thread block knows of its work."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.planner import BLOCK_SIZE, ROWS, num_blocks

PAGE = 64
LATENT, ROPE = 512, 64
HALF = 256
"""Columns of the output that a warpgroup holds."""
PIECE = 128
"""Columns of the latent that arrive, and are awaited, together."""
NUM_PIECES = LATENT // PIECE
NEVER = -1e30
"""A finite running maximum of no key: exp(-inf - NEVER) is 0, where exp(-inf + inf) would be NaN."""
MATES = "mates"
"""The axis of the two thread blocks of a cluster, where pages are multicast."""


class Scratch(NamedTuple):
    """Shared memory, 217 KiB of 227, and barriers; see `pallas_attend` for who uses them."""

    q: Any
    q_rope: Any
    kv: Any
    k_rope: Any
    maxima: Any
    sums: Any
    q_full: Any
    q_free: Any
    full: Any
    landed: Any
    empty: Any
    told_m0: Any
    told_p1: Any
    told_p0: Any
    met: Any

    @property
    def q_latent(self):
        """BF16 [4, 64, 128]: the queries, later the outputs of a whole sequence."""
        return self.q[0]

    @property
    def staging(self):
        """float32 [2, 64, 128] in the same memory: outputs of part of a sequence, by warpgroup."""
        return self.q[1]


def scratch_types(*, multicast: bool) -> list[Any]:
    """What `Scratch` is made of, in its order."""
    bf16, f32 = (
        (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
        for columns in (64, 32)
    )
    if multicast:
        empty = plgpu.ClusterBarrier(collective_axes=(MATES,), num_arrivals=1, num_barriers=(2, 2))
    else:
        empty = plgpu.Barrier(num_arrivals=1, num_barriers=(2, 2))
    return [
        plgpu.RefUnion(
            plgpu.SMEM((NUM_PIECES, ROWS, PIECE), jnp.bfloat16, transforms=bf16),
            plgpu.SMEM((2, ROWS, PIECE), jnp.float32, transforms=f32),
        ),
        plgpu.SMEM((1, ROWS, ROPE), jnp.bfloat16, transforms=bf16),
        plgpu.SMEM((2, NUM_PIECES, PAGE, PIECE), jnp.bfloat16, transforms=bf16),
        plgpu.SMEM((2, PAGE, ROPE), jnp.bfloat16, transforms=bf16),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=NUM_PIECES + 1),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=1, num_barriers=(2, NUM_PIECES + 1)),
        plgpu.Barrier(num_arrivals=1, num_barriers=(2, NUM_PIECES + 1)),
        empty,
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=1),
        plgpu.Barrier(num_arrivals=2),
    ]


class Segment(NamedTuple):
    """The blocks `begin .. end - 1` (pairs of pages) of one sequence, as scalars; cut to what the page table holds."""

    seq: Any
    length: Any
    begin: Any
    end: Any
    is_whole: Any


def segment_of(seq, lengths, first_seq, first_block, last_seq, end_block, *, max_length: int) -> Segment:
    """What a part does of sequence `seq`; `first_seq` to `end_block` are its row of `planner.Plan.parts`.

    Blocks of a length beyond the page table are planned and passed over: a part of them sees no key.
    """
    length = lengths[seq]
    begin = jnp.where(seq == first_seq, first_block, 0)
    blocks = num_blocks(length)
    end = jnp.where(seq == last_seq, end_block, blocks)
    is_whole = (begin == 0) & (end == blocks)
    begin, end = (jnp.minimum(block, -(-max_length // BLOCK_SIZE)) for block in (begin, end))
    return Segment(seq, jnp.clip(length, 0, max_length), begin, end, is_whole)
