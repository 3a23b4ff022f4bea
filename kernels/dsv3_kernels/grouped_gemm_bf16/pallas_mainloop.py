"""The pipeline of a bf16 tile: one warpgroup loads 64 elements of the contraction at a time, two multiply them.

Barriers. Slot s of a ring of `stages` has two, and every thread waits for each of their phases once:
- full[s]: arrives once for each of the 2 copies of a stage, and completes when their bytes have landed.
- empty[s]: arrives once a consumer, when the tensor cores are done with the slot. The producer waits.
A consumer lets go of a slot one step late, when at most the matmuls after it are under way: so the tensor cores always
have the next ones queued. It always holds one slot, therefore: the one before the next. At the start that is the last
of the ring, and when all tiles are done the last one read is let go. The producer waits once more for every slot.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.sm90.mainloop import consumer_offsets, next_slot, swizzled
from dsv3_kernels.sm90.schedule import Work
from dsv3_kernels.sm90.tile import CONSUMERS, Tile

BLOCK_K = 64
"""Elements of the contraction in one stage: the width of a 128-byte swizzle in bf16."""
COPIES_PER_STAGE = 2


class Layout(NamedTuple):
    """Which axis of each operand is contracted, as it lies in global memory."""

    is_a_k_first: bool
    """a is [K, M] and not [M, K]."""
    is_b_k_first: bool
    """b is [K, N] and not [N, K]."""


class Ring(NamedTuple):
    """The slots in shared memory, and their barriers."""

    a: Any
    b: Any
    full: Any
    empty: Any


def ring_types(tile: Tile, layout: Layout) -> Ring:
    """What `plgpu.kernel` has to allocate for a ring."""
    a = (BLOCK_K, tile.block_m) if layout.is_a_k_first else (tile.block_m, BLOCK_K)
    b = (BLOCK_K, tile.block_n) if layout.is_b_k_first else (tile.block_n, BLOCK_K)
    return Ring(
        a=plgpu.SMEM((tile.stages, *a), jnp.bfloat16, transforms=swizzled(128, 2)),
        b=plgpu.SMEM((tile.stages, *b), jnp.bfloat16, transforms=swizzled(128, 2)),
        full=plgpu.Barrier(num_arrivals=COPIES_PER_STAGE, num_barriers=tile.stages),
        empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.stages),
    )


def load_tile(tile: Tile, layout: Layout, a: Any, b: Any, ring: Ring, work: Work, slot: Any) -> Any:
    """Fills one slot for each block of the contraction; returns the slot after the last."""
    rows, columns = pl.ds(work.row, tile.block_m), pl.ds(work.column, tile.block_n)

    def step(i: Any, slot: Any) -> Any:
        inner = pl.ds((work.first_block + i) * BLOCK_K, BLOCK_K)
        from_a = (inner, rows) if layout.is_a_k_first else (rows, inner)
        from_b = (inner, columns) if layout.is_b_k_first else (columns, inner)
        plgpu.barrier_wait(ring.empty.at[slot])
        plgpu.copy_gmem_to_smem(_at(a, work.a_lead, *from_a), ring.a.at[slot], ring.full.at[slot])
        plgpu.copy_gmem_to_smem(_at(b, work.b_lead, *from_b), ring.b.at[slot], ring.full.at[slot])
        return next_slot(slot, tile.stages)

    return lax.fori_loop(jnp.int32(0), jnp.int32(work.num_blocks), step, slot)


def multiply_tile(tile: Tile, layout: Layout, ring: Ring, work: Work, slot: Any, consumer: Any) -> tuple[Any, Any]:
    """Multiplies what `load_tile` fills; returns the slot after the last and this consumer's float32 [64, columns]."""
    row, column = consumer_offsets(tile, consumer, 0)
    rows, columns = pl.ds(row, 64), pl.ds(column, tile.columns)

    def multiply(sums: Any) -> tuple[Any, Any]:
        def step(_: Any, slot: Any) -> Any:
            a = ring.a.at[slot, :, rows].T if layout.is_a_k_first else ring.a.at[slot, rows]
            b = ring.b.at[slot, :, columns] if layout.is_b_k_first else ring.b.at[slot, columns].T
            plgpu.barrier_wait(ring.full.at[slot])
            plgpu.wgmma(sums, a, b)
            plgpu.wgmma_wait(1)
            release_before(tile, ring, slot)
            return next_slot(slot, tile.stages)

        slot_after = lax.fori_loop(jnp.int32(0), jnp.int32(work.num_blocks), step, slot)
        return slot_after, sums[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, tile.columns), jnp.float32))


def release_before(tile: Tile, ring: Ring, slot: Any) -> None:
    """Signals that this consumer is done with the slot before `slot`."""
    plgpu.barrier_arrive(ring.empty.at[lax.select(slot == 0, jnp.int32(tile.stages - 1), slot - 1)])


def _at(ref: Any, lead: Any, *index: Any) -> Any:
    return ref.at[index] if lead is None else ref.at[(lead, *index)]
