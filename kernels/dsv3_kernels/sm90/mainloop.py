"""The pipeline of a tile: one warpgroup loads 128 elements of the contraction at a time, two multiply and promote them.

Barriers. Slot s of a ring of `stages` has up to four, and every thread waits for each of their phases once:
- full[s]: arrives once for each of the first 4 copies of a stage, issued by this block's producer, and completes when
  all their bytes have landed, those that the other block of the cluster multicasts included. Both consumers wait.
  Bytes of the other block may come before this block's producer has arrived for the same phase: the phase cannot end
  before its 4 arrivals, and not have begun later, for the other block waits for `shared_empty`.
- more[s] (tiles of 256 rows only): the same for the copy of the lower 128 rows of a, which are multiplied second.
- empty[s]: arrives once a consumer of this block, by all its threads, after its last read of the slot: after the
  tensor cores are done with the operands, and after the scales are in registers. The producer waits.
- shared_empty[s] (clusters only): the same from the consumers of both blocks, before either overwrites half of the
  other's slot. One thread a consumer arrives. That covers what a multicast overwrites, the operands: they are read by
  the tensor cores alone, for the whole warpgroup, and done when any of its threads has waited for them. It does
  not cover the scales, read thread by thread, which are not multicast: `empty` does.
Consumers arrive once at each slot before they start, so the producer waits before every copy without a special case
for the first round; at the end it waits once more for every slot. No block thereby leaves while the other may still
signal it or write to it, and no phase stays unobserved.

The scales are read by threads and overwritten by copies, two proxies of memory. The arrival and the wait order such a
read before the write without a fence: arriving is a release, before which earlier reads are done; CUTLASS's pipelines
hand their slots back the same way. The interpreter wants a fence there and gets one (`Ring.fences_reads`), so
that its race detector can judge all the rest. Writes of threads that a copy reads are another matter: see `epilogue`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.sm90.schedule import Work
from dsv3_kernels.sm90.tile import BLOCK_K, CONSUMERS, SCALES_PER_STAGE, Tile, scale_runs

COPIES_PER_STAGE = 4
CLUSTER_AXIS = "cluster"


class Operands(NamedTuple):
    """In global memory, with a leading axis of groups where the work has one.

    a [M, K], a_scales [K/128, M]: a stage's scales lie side by side. b [N, K]; b_scales [K/128, N], or
    [K/128, ceil(N/128)] for 128x128 blocks.
    """

    a: Any
    a_scales: Any
    b: Any
    b_scales: Any


class Ring(NamedTuple):
    """The slots in shared memory, and their barriers."""

    a: Any
    b: Any
    a_scales: Any
    b_scales: Any
    full: Any
    empty: Any
    more: Any = None
    shared_empty: Any = None
    fences_reads: bool = False


def ring_types(tile: Tile, *, is_b_scaled_by_row: bool) -> Ring:
    """What `plgpu.kernel` has to allocate for a ring."""
    scales = tile.block_n if is_b_scaled_by_row else SCALES_PER_STAGE
    stages = tile.stages
    return Ring(
        a=plgpu.SMEM((stages, tile.block_m, BLOCK_K), jnp.float8_e4m3fn, transforms=swizzled(128, 1)),
        b=plgpu.SMEM((stages, tile.block_n, BLOCK_K), jnp.float8_e4m3fn, transforms=swizzled(128, 1)),
        a_scales=plgpu.SMEM((stages, tile.block_m), jnp.float32),
        b_scales=plgpu.SMEM((stages, scales), jnp.float32),
        full=plgpu.Barrier(num_arrivals=COPIES_PER_STAGE, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        more=plgpu.Barrier(num_arrivals=1, num_barriers=stages) if tile.waves > 1 else None,
        shared_empty=plgpu.ClusterBarrier(collective_axes=(CLUSTER_AXIS,), num_arrivals=CONSUMERS, num_barriers=stages)
        if tile.cluster
        else None,
    )


def swizzled(swizzle: int, item_size: int) -> tuple[Any, Any]:
    """Rows in tiles of 8 by one swizzle of so many bytes: the layout of tensor cores, free of bank conflicts."""
    tiling = plgpu.TilingTransform((8, swizzle // item_size))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def next_slot(slot: Any, stages: int) -> Any:
    """The slot after `slot`."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def load_tile(tile: Tile, operands: Operands, ring: Ring, work: Work, slot: Any, *, is_b_scaled_by_row: bool) -> Any:
    """Fills one slot for each block of the contraction; returns the slot after the last."""
    if is_b_scaled_by_row:
        scale_column, scale_count = work.column, tile.block_n
    else:
        scale_column, scale_count = lax.div(work.column, jnp.int32(BLOCK_K)), SCALES_PER_STAGE

    def step(i: Any, slot: Any) -> Any:
        block = work.first_block + i
        inner = pl.ds(block * BLOCK_K, BLOCK_K)
        await_empty(ring, slot)
        full = ring.full.at[slot]
        height = tile.block_m // tile.waves
        for wave in range(tile.waves):
            plgpu.copy_gmem_to_smem(
                _at(operands.a, work.a_lead, pl.ds(work.row + wave * height, height), inner),
                ring.a.at[slot, pl.ds(wave * height, height)],
                ring.more.at[slot] if wave else full,
                collective_axes=CLUSTER_AXIS if tile.cluster == "n" else None,
            )
        plgpu.copy_gmem_to_smem(
            _at(operands.b, work.b_lead, pl.ds(work.column, tile.block_n), inner),
            ring.b.at[slot],
            full,
            collective_axes=CLUSTER_AXIS if tile.cluster == "m" else None,
        )
        plgpu.copy_gmem_to_smem(
            _at(operands.a_scales, work.a_lead, block, pl.ds(work.row, tile.block_m)), ring.a_scales.at[slot], full
        )
        plgpu.copy_gmem_to_smem(
            _at(operands.b_scales, work.b_lead, block, pl.ds(scale_column, scale_count)), ring.b_scales.at[slot], full
        )
        return next_slot(slot, tile.stages)

    return lax.fori_loop(jnp.int32(0), jnp.int32(work.num_blocks), step, slot)


def multiply_tile(
    tile: Tile, ring: Ring, work: Work, slot: Any, consumer: Any, *, is_b_scaled_by_row: bool
) -> tuple[Any, list[list[Any]]]:
    """Multiplies and promotes what `load_tile` fills, and returns the slot after the last and this consumer's sums.

    The tensor cores add up 128 products in registers of their own; with both scales those are added to the float32
    sums of the tile (two-level accumulation). One consumer promotes while the other one's products are under way.

    Returns: sums[wave][run], float32 [64, columns of the run]: runs of columns that share a scale of b.
    """
    _, column = consumer_offsets(tile, consumer, 0)
    runs = [tile.columns] if is_b_scaled_by_row else _runs(tile)
    starts = [sum(runs[:i]) for i in range(len(runs))]

    def b_scale_of(slot: Any) -> list[Any]:
        if is_b_scaled_by_row:
            return [plgpu.load(ring.b_scales.at[slot, pl.ds(column, tile.columns)], layout=_COLUMNS)]
        begin = lax.rem(work.column, jnp.int32(BLOCK_K)) + column
        return [ring.b_scales[slot, lax.div(begin + start, jnp.int32(BLOCK_K))] for start in starts]

    def step(_: Any, carry: Any) -> Any:
        slot, sums = carry
        plgpu.barrier_wait(ring.full.at[slot])
        for wave in range(tile.waves):
            if wave:
                # Besides waiting, this ends a basic block: ptxas would start these products, in registers of their
                # own, while it still adds the first ones up, and spill 160 bytes.
                plgpu.barrier_wait(ring.more.at[slot])
            row, column = consumer_offsets(tile, consumer, wave)
            rows, columns = pl.ds(row, 64), pl.ds(column, tile.columns)

            def multiply(products: Any, rows: Any = rows, columns: Any = columns) -> Any:
                plgpu.wgmma(products, ring.a.at[slot, rows], ring.b.at[slot, columns].T)
                a_scale = plgpu.load(ring.a_scales.at[slot, rows], layout=_ROWS)
                b_scales = b_scale_of(slot)
                return products[...], a_scale, b_scales

            products, a_scale, b_scales = pl.run_scoped(
                multiply, plgpu.WGMMAAccumulatorRef((64, tile.columns), jnp.float32)
            )
            if wave == tile.waves - 1:
                arrive_empty(ring, slot)
            for run, (start, width) in enumerate(zip(starts, runs)):
                part = lax.slice(products, (0, start), (64, start + width)) if len(runs) > 1 else products
                sums[wave][run] = sums[wave][run] + part * _scale(a_scale, b_scales[run], width)
            if wave < tile.waves - 1:
                sums[wave] = list(lax.optimization_barrier(tuple(sums[wave])))
        return next_slot(slot, tile.stages), sums

    zeros = [
        [plgpu.layout_cast(jnp.zeros((64, width), jnp.float32), plgpu.Layout.WGMMA) for width in runs]
        for _ in range(tile.waves)
    ]
    return lax.fori_loop(jnp.int32(0), jnp.int32(work.num_blocks), step, (slot, zeros))


def consumer_offsets(tile: Tile, consumer: Any, wave: int) -> tuple[Any, Any]:
    """First row and column within its tile that a consumer multiplies the `wave`-th time."""
    if tile.block_m == 64:
        return 0, consumer * tile.columns
    return (CONSUMERS * wave + consumer) * 64, 0


def await_empty(ring: Ring, slot: Any) -> None:
    """Waits until all that read the slot are done with it."""
    plgpu.barrier_wait(ring.empty.at[slot])
    if ring.shared_empty is not None:
        plgpu.barrier_wait(ring.shared_empty.at[slot])


def arrive_empty(ring: Ring, slot: Any) -> None:
    """Says that this consumer is done with the slot."""
    if ring.fences_reads:
        plgpu.commit_smem()
    plgpu.barrier_arrive(ring.empty.at[slot])
    if ring.shared_empty is not None:
        plgpu.barrier_arrive(ring.shared_empty.at[slot])


def every_slot(stages: int, do: Callable[[Any], None]) -> None:
    """do(slot) for each slot of the ring."""

    @pl.loop(0, stages)
    def _visit(slot: Any) -> None:
        do(slot)


_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def _runs(tile: Tile) -> list[int]:
    """Widths of runs of columns with one scale; a single one where no tile crosses a border of 128 columns."""
    if BLOCK_K % tile.block_n == 0 or (
        tile.columns <= BLOCK_K and BLOCK_K % tile.columns == 0 and tile.block_n % BLOCK_K == 0
    ):
        return [tile.columns]
    run = scale_runs(tile)
    return [run] * (tile.columns // run)


def _scale(a_scale: Any, b_scale: Any, width: int) -> Any:
    """The product of the scales of both operands, [64, width]."""
    if b_scale.ndim == 0:
        return lax.broadcast_in_dim(a_scale * b_scale, (64, width), (0,))
    return lax.broadcast_in_dim(a_scale, (64, width), (0,)) * lax.broadcast_in_dim(b_scale, (64, width), (1,))


def _at(ref: Any, lead: Any, *index: Any) -> Any:
    return ref.at[index] if lead is None else ref.at[(lead, *index)]
