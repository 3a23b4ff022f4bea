"""The pipeline of a tile: one warpgroup loads 128 elements of the contraction at a time, two multiply and promote them.

Barriers. Slot s of a ring of `stages` has up to four, and every thread waits for each of their phases once:
- full[s]: arrives once for each of the first 2 copies of a stage, issued by this block's producer, and completes when
  all their bytes have landed, those that the other block of the cluster multicasts included. Both consumers wait.
  Bytes of the other block may come before this block's producer has arrived for the same phase: the phase cannot end
  before its 2 arrivals, and not have begun later, for the other block waits for `shared_empty`.
- more[s] (tiles of 256 rows only): the same for the copy of the lower 128 rows of a, which are multiplied second.
- empty[s]: arrives once a consumer of this block, by all its threads, after the tensor cores are done with the
  operands. The producer waits.
- shared_empty[s] (clusters only): the same from the consumers of both blocks, before either overwrites half of the
  other's slot. One thread a consumer arrives: the operands are read by the tensor cores alone, for the whole
  warpgroup, and done when any of its threads has waited for them.
Consumers arrive once at each slot before they start, so the producer waits before every copy without a special case
for the first round; at the end it waits once more for every slot. No block thereby leaves while the other may still
signal it or write to it, and no phase stays unobserved.

Scales are read as they are stored, row by row, and a copy moves at least 16 bytes of a row. So they come in panels of 4
columns, for 4 blocks of the contraction, in a ring of their own with barriers of the same kind: panel_full, which both
copies of a panel arrive at, and panel_empty. A panel starts at a multiple of 4 blocks, wherever the tile's part of the
contraction does. Where a row of scales has no full 16 bytes, and few columns, copies take whole rows, 4 rows as one,
and a panel has all blocks of the contraction.

The panels are read by threads and overwritten by copies, two proxies of memory. The arrival and the wait order such a
read before the write without a fence: arriving is a release, before which earlier reads are done; CUTLASS's pipelines
hand their slots back the same way. The interpreter wants a fence there and gets one (`Ring.fences_reads`), so
that its race detector can judge all the rest. Writes of threads that a copy reads are another matter: see `epilogue`.

Where each row of b has a scale, a thread wants those of two neighbouring columns at once, which a panel has 16 bytes
apart. Each consumer transposes them first, in memory of its own, of which there is as much again: a thread that is
ahead writes one half while others read the other. From one tile to the next the epilogue's barrier keeps them together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.casts.pallas_rounding import store
from dsv3_kernels.sm90.schedule import Work
from dsv3_kernels.sm90.tile import (
    BLOCK_K,
    CONSUMERS,
    PANEL,
    SCALE_ROWS,
    Tile,
    b_scale_rows,
    num_panels,
    panel_columns,
    scale_runs,
)

COPIES_PER_STAGE = 2
CLUSTER_AXIS = "cluster"


class Operands(NamedTuple):
    """In global memory, with a leading axis of groups where the work has one; scales as `QTensor` has them.

    a [M, K], a_scales [M, K/128]. b [N, K]; b_scales [N, K/128], or [ceil(N/128), K/128] for 128x128 blocks.
    """

    a: Any
    a_scales: Any
    b: Any
    b_scales: Any


class Ring(NamedTuple):
    """The slots in shared memory, and their barriers."""

    a: Any
    b: Any
    full: Any
    empty: Any
    a_scales: Any
    b_scales: Any
    panel_full: Any
    panel_empty: Any
    column_scales: Any = None
    more: Any = None
    shared_empty: Any = None
    fences_reads: bool = False
    copies_by_four: bool = True
    """Whether whole rows of scales are copied 4 as one; the interpreter has no such views, and copies any row."""


class Place(NamedTuple):
    """Where a warpgroup is in the ring."""

    slot: Any
    panel: Any


def ring_types(tile: Tile, *, contraction: int, is_b_scaled_by_row: bool) -> Ring:
    """What `plgpu.kernel` has to allocate for a ring of operands with so long a contraction."""
    stages = tile.stages
    width = panel_columns(contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    panels = num_panels(tile, width)
    scale_rows = b_scale_rows(tile, width, is_b_scaled_by_row=is_b_scaled_by_row)
    layout = swizzled(operand_swizzle(contraction), 1)
    return Ring(
        a=plgpu.SMEM((stages, tile.block_m, BLOCK_K), jnp.float8_e4m3fn, transforms=layout),
        b=plgpu.SMEM((stages, tile.block_n, BLOCK_K), jnp.float8_e4m3fn, transforms=layout),
        full=plgpu.Barrier(num_arrivals=COPIES_PER_STAGE, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        a_scales=plgpu.SMEM((panels, tile.block_m, width), jnp.float32),
        b_scales=plgpu.SMEM((panels, scale_rows, width), jnp.float32),
        panel_full=plgpu.Barrier(num_arrivals=2, num_barriers=panels),
        panel_empty=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=panels),
        column_scales=plgpu.SMEM((CONSUMERS, 2, PANEL, tile.column_scales), jnp.float32)
        if is_b_scaled_by_row
        else None,
        more=plgpu.Barrier(num_arrivals=1, num_barriers=stages) if tile.waves > 1 else None,
        shared_empty=plgpu.ClusterBarrier(collective_axes=(CLUSTER_AXIS,), num_arrivals=CONSUMERS, num_barriers=stages)
        if tile.cluster
        else None,
    )


def operand_swizzle(contraction: int) -> int:
    """Bytes of the swizzle in which operands are copied: copies want full ones of each row."""
    return 64 if contraction % BLOCK_K == 64 else 128


def swizzled(swizzle: int, item_size: int) -> tuple[Any, ...]:
    """Rows in tiles of 8 by one swizzle of so many bytes: the layout of tensor cores, free of bank conflicts.

    16 bytes are too few to move about.
    """
    if swizzle == 16:
        return ()
    tiling = plgpu.TilingTransform((8, swizzle // item_size))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def next_slot(slot: Any, stages: int) -> Any:
    """The slot after `slot`."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def by_fours(operands: Operands) -> Operands:
    """The operands with 4 rows of scales as one, as they are copied where a panel holds whole rows."""

    def joined(scales: Any) -> Any:
        *lead, rows, width = scales.shape
        return scales.reshape(*lead, rows // SCALE_ROWS, SCALE_ROWS * width)

    return operands._replace(a_scales=joined(operands.a_scales), b_scales=joined(operands.b_scales))


def first_place() -> Place:
    """Where every warpgroup starts."""
    return Place(jnp.int32(0), jnp.int32(0))


def load_tile(
    tile: Tile,
    operands: Operands,
    ring: Ring,
    work: Work,
    place: Place,
    *,
    contraction: int,
    is_b_scaled_by_row: bool,
) -> Place:
    """Fills a slot for each block of the contraction, and panels as they begin; returns the place after the last."""
    width = panel_columns(contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    scale_row = work.column if is_b_scaled_by_row else lax.div(work.column, jnp.int32(BLOCK_K))
    scale_rows = b_scale_rows(tile, width, is_b_scaled_by_row=is_b_scaled_by_row)

    def copy_panel(scales: Any, lead: Any, row: Any, rows: int, columns: Any, panels: Any, at: Any) -> None:
        target = panels.at[at]
        if width != PANEL:
            fours = lax.div(row, jnp.int32(SCALE_ROWS))
            row, columns = fours * SCALE_ROWS, pl.ds(0, width)
            if ring.copies_by_four:
                row, rows, columns = fours, rows // SCALE_ROWS, pl.ds(0, SCALE_ROWS * width)
                target = target.reshape(rows, SCALE_ROWS * width)
        plgpu.copy_gmem_to_smem(_at(scales, lead, pl.ds(row, rows), columns), target, ring.panel_full.at[at])

    def load_panel(panel: Any, index: Any) -> None:
        columns = pl.ds(index * PANEL, PANEL)
        plgpu.barrier_wait(ring.panel_empty.at[panel])
        copy_panel(operands.a_scales, work.a_lead, work.row, tile.block_m, columns, ring.a_scales, panel)
        copy_panel(operands.b_scales, work.b_lead, scale_row, scale_rows, columns, ring.b_scales, panel)

    def load_block(slot: Any, _: Any, index: Any, block: Any, nothing: Any) -> tuple[Any, Any]:
        inner = pl.ds((index * width + block) * BLOCK_K, BLOCK_K)
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
        return next_slot(slot, tile.stages), nothing

    return _each_block(tile, width, work, place, None, begin=load_panel, step=load_block)[0]


def multiply_tile(
    tile: Tile, ring: Ring, work: Work, place: Place, consumer: Any, *, contraction: int, is_b_scaled_by_row: bool
) -> tuple[Place, list[list[Any]]]:
    """Multiplies and promotes what `load_tile` fills; returns the place after the last, and this consumer's sums.

    The tensor cores add up 128 products in registers of their own; with both scales those are added to the float32
    sums of the tile (two-level accumulation). One consumer promotes while the other one's matmuls are under way.

    Returns: sums[wave][run], float32 [64, columns of the run]: runs of columns that share a scale of b.
    """
    width = panel_columns(contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    _, column = consumer_offsets(tile, consumer, 0)
    runs = [tile.columns] if is_b_scaled_by_row else _runs(tile)
    starts = [sum(runs[:i]) for i in range(len(runs))]

    def begin(panel: Any, index: Any) -> None:
        plgpu.barrier_wait(ring.panel_full.at[panel])
        if is_b_scaled_by_row:
            mine = ring.column_scales.at[consumer, lax.rem(index, jnp.int32(2))]
            for block in range(PANEL):
                for first in range(0, tile.column_scales, 64):
                    scales = plgpu.load(
                        ring.b_scales.at[panel, pl.ds(column + first, 64), block], layout=_ROWS, optimized=False
                    )
                    store(mine.at[block, pl.ds(first, 64)], scales)
            plgpu.commit_smem()

    def end(panel: Any) -> None:
        if ring.fences_reads:
            plgpu.commit_smem()
        plgpu.barrier_arrive(ring.panel_empty.at[panel])

    def b_scales_of(panel: Any, index: Any, block: Any) -> list[Any]:
        if is_b_scaled_by_row:
            mine = ring.column_scales.at[consumer, lax.rem(index, jnp.int32(2)), block]
            return [plgpu.load(mine.at[pl.ds(0, tile.columns)], layout=_COLUMNS)]
        # From the first row that was copied: that of the tile's first column, or the multiple of 4 before it.
        period = jnp.int32(BLOCK_K if width == PANEL else SCALE_ROWS * BLOCK_K)
        first = lax.rem(work.column, period) + column
        return [ring.b_scales[panel, lax.div(first + start, jnp.int32(BLOCK_K)), block] for start in starts]

    def step(slot: Any, panel: Any, index: Any, block: Any, sums: Any) -> tuple[Any, Any]:
        plgpu.barrier_wait(ring.full.at[slot])
        for wave in range(tile.waves):
            if wave:
                # Besides waiting, this ends a basic block: ptxas would start these matmuls, in registers of their
                # own, while it still adds the first ones up, and spill 160 bytes.
                plgpu.barrier_wait(ring.more.at[slot])
            row, column = consumer_offsets(tile, consumer, wave)
            rows, columns = pl.ds(row, 64), pl.ds(column, tile.columns)

            def multiply(products: Any, rows: Any = rows, columns: Any = columns) -> Any:
                plgpu.wgmma(products, ring.a.at[slot, rows], ring.b.at[slot, columns].T)
                a_scale = plgpu.load(ring.a_scales.at[panel, rows, block], layout=_ROWS, optimized=False)
                b_scales = b_scales_of(panel, index, block)
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
        if tile.waves > 1:
            # Another use of the zero that matmuls start from keeps it out of their registers: ptxas then starts them
            # from an immediate, and not from 64 moves.
            return next_slot(slot + lax.optimization_barrier(jnp.int32(0)), tile.stages), sums
        return next_slot(slot, tile.stages), sums

    zeros = [
        [plgpu.layout_cast(jnp.zeros((64, width), jnp.float32), plgpu.Layout.WGMMA) for width in runs]
        for _ in range(tile.waves)
    ]
    return _each_block(tile, width, work, place, zeros, begin=begin, step=step, end=end)


def _each_block(
    tile: Tile,
    width: int,
    work: Work,
    place: Place,
    carry: Any,
    *,
    begin: Callable[[Any, Any], None],
    step: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]],
    end: Callable[[Any], None] = lambda _: None,
) -> tuple[Place, Any]:
    """Walks the blocks of the work's part of the contraction, panel by panel of `width` blocks.

    begin(panel, which of all), then slot, carry = step(slot, panel, which of all, block within it, carry) for each of
    its blocks, then end(panel).
    """
    # LLVM would unroll loops whose lengths it knows, and the producer, with 40 registers, would spill.
    last = lax.optimization_barrier(work.first_block + work.num_blocks)
    first_panel = lax.div(work.first_block, jnp.int32(width))
    count_panels = lax.div(last + width - 1, jnp.int32(width)) - first_panel
    panels = num_panels(tile, width)

    def one_panel(i: Any, both: Any) -> Any:
        (slot, panel), carry = both
        index = first_panel + i
        first = lax.max(work.first_block - index * width, jnp.int32(0))
        count = lax.min(last - index * width, jnp.int32(width)) - first
        begin(panel, index)
        slot, carry = lax.fori_loop(
            jnp.int32(0), count, lambda j, state: step(state[0], panel, index, first + j, state[1]), (slot, carry)
        )
        end(panel)
        return Place(slot, next_slot(panel, panels)), carry

    return lax.fori_loop(jnp.int32(0), count_panels, one_panel, (place, carry))


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
    """Signals that this consumer is done with the slot."""
    plgpu.barrier_arrive(ring.empty.at[slot])
    if ring.shared_empty is not None:
        plgpu.barrier_arrive(ring.shared_empty.at[slot])


def release_all(ring: Ring) -> None:
    """What a consumer does before it starts: hands every slot and panel to the producer."""
    _every(ring.empty.shape[0], lambda slot: arrive_empty(ring, slot))
    _every(ring.panel_empty.shape[0], lambda panel: plgpu.barrier_arrive(ring.panel_empty.at[panel]))


def await_all(ring: Ring) -> None:
    """What the producer does at the end: waits until every slot and panel is handed back."""
    _every(ring.empty.shape[0], lambda slot: await_empty(ring, slot))
    _every(ring.panel_empty.shape[0], lambda panel: plgpu.barrier_wait(ring.panel_empty.at[panel]))


def _every(count: int, do: Callable[[Any], None]) -> None:
    @pl.loop(0, count)
    def _visit(index: Any) -> None:
        do(index)


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
