"""The end of a tile: sums go through shared memory to the output, while the next tile is already under way.

A consumer writes chunks of 64 rows into slots of its own and has them copied out without waiting. It waits before it
writes a slot again: for that the copy that reads it must be the only one that can be unfinished, or older than those
that may be. `commit_smem` makes the writes of all threads of the consumer visible to the copy (a fence between the
proxies, then a barrier of the warpgroup), and the copy is issued by one of them after that.

With `split_k` the blocks of a cluster have sums of one tile over parts of the contraction. Each writes its own to
memory (to L2, that is), waits until all have, and adds up a share of the columns, part after part, so that two runs
give the same bits. A cluster's blocks run at the same time by definition: none can wait for one that never starts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from dsv3_kernels.casts.pallas_rounding import store
from dsv3_kernels.sm90.mainloop import CLUSTER_AXIS, consumer_offsets, swizzled
from dsv3_kernels.sm90.schedule import Work
from dsv3_kernels.sm90.tile import CONSUMERS, Tile, output_chunk, output_slots


class Exchange(NamedTuple):
    """How the blocks of a cluster give each other their sums of a tile."""

    partial: Any
    """Global memory [parts, M, N] in full tiles, float32."""
    written: Any
    """Barriers of the cluster, one a consumer: all parts of its share of a tile are in `partial`."""
    fences: bool
    """Whether to fence: the interpreter has no such fence, and wants none."""


def partial_type(tile: Tile, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct | None:
    """`Exchange.partial` for an output [M, N], or None where no tile has parts."""
    if tile.split_k == 1:
        return None
    M, N = (-(-size // block) * block for size, block in zip(shape, (tile.block_m, tile.block_n), strict=True))
    return jax.ShapeDtypeStruct((tile.split_k, M, N), jnp.float32)


def written_type() -> Any:
    """`Exchange.written`."""
    return plgpu.ClusterBarrier(collective_axes=(CLUSTER_AXIS,), num_arrivals=1, num_barriers=CONSUMERS)


def add_parts(
    tile: Tile, sums: list[list[Any]], exchange: Exchange, work: Work, consumer: Any, part: Any
) -> list[list[Any]]:
    """The sums over all parts of the contraction of this block's share of a consumer's columns."""
    width = tile.output_columns

    def at(part: Any, wave: int, first: Any, columns: int) -> Any:
        row, column = consumer_offsets(tile, consumer, wave)
        return exchange.partial.at[part, pl.ds(work.row + row, 64), pl.ds(work.column + column + first, columns)]

    for wave in range(tile.waves):
        store(at(part, wave, 0, tile.columns), _joined(sums[wave]))
    plgpu.commit_smem()  # a barrier of the warpgroup: one thread of it signals each block
    _fence(exchange)
    plgpu.barrier_arrive(exchange.written.at[consumer])
    plgpu.barrier_wait(exchange.written.at[consumer])
    _fence(exchange)
    added = []
    for wave in range(tile.waves):
        parts = [
            plgpu.load(at(other, wave, part * width, width), layout=plgpu.Layout.WGMMA, optimized=False)
            for other in range(tile.split_k)
        ]
        added.append([sum(parts[1:], parts[0])])
    return added


def staging_type(tile: Tile, dtype: jax.typing.DTypeLike, *, contraction: int, is_b_scaled_by_row: bool) -> Any:
    """Shared memory for chunks on their way out: [consumers, slots, 64, columns]."""
    chunk, swizzle = output_chunk(tile.output_columns, dtype)
    slots = output_slots(tile, dtype, contraction=contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    if not slots:
        raise ValueError(f"tile {tile.name} does not fit in shared memory with {jnp.dtype(dtype).name} outputs.")
    return plgpu.SMEM((CONSUMERS, slots, 64, chunk), dtype, transforms=swizzled(swizzle, jnp.dtype(dtype).itemsize))


def store_tile(
    tile: Tile, sums: list[list[Any]], out: Any, staging: Any, work: Work, consumer: Any, *, part: Any = 0, adds: bool
) -> None:
    """Starts copying this consumer's columns of a tile to `out`, or adding them there; what lies outside is dropped.

    With `split_k` they are the share that block `part` of the cluster has added up.
    """
    chunk, swizzle = output_chunk(tile.output_columns, out.dtype)
    slots = staging.shape[1]
    index = 0
    for wave in range(tile.waves):
        whole = _joined(sums[wave])
        row, column = consumer_offsets(tile, consumer, wave)
        first_row, first_column = work.row + row, work.column + column
        if tile.split_k > 1:
            first_column += part * tile.output_columns
        if work.valid_rows is not None:
            whole = _keep_rows(whole, work.valid_rows - first_row)
        for start in range(0, tile.output_columns, chunk):
            # Chunks take the slots in turn, in this tile and the next, so the oldest of `slots` copies used this one.
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            piece = lax.slice(whole, (0, start), (64, start + chunk)) if chunk < tile.output_columns else whole
            slot = staging.at[consumer, index % slots]
            if swizzle > 16:
                slot[...] = piece.astype(out.dtype)
            else:
                store(slot, piece.astype(out.dtype))
            plgpu.commit_smem()
            there = (pl.ds(first_row, 64), pl.ds(first_column + start, chunk))
            target = out.at[there] if work.out_lead is None else out.at[(work.out_lead, *there)]
            plgpu.copy_smem_to_gmem(slot, target, reduction_op="add" if adds else None)
            index += 1


def finish_stores() -> None:
    """Waits until nothing reads the staging memory any more."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _joined(runs: list[Any]) -> Any:
    """All columns of a consumer in one array."""
    return runs[0] if len(runs) == 1 else lax.concatenate(runs, 1)


def _fence(exchange: Exchange) -> None:
    """Orders global memory between the blocks of a cluster: Mosaic's barriers do for those of one block only."""
    if exchange.fences:
        plgpu.inline_mgpu()(_fence_cluster)()


def _fence_cluster(_: Any) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.acq_rel.cluster;", "~{memory}", has_side_effects=True)


def _keep_rows(x: Any, count: Any) -> Any:
    """The first `count` rows of x [64, columns], zeros behind (also where x is NaN)."""
    rows = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    keep = rows < lax.broadcast_in_dim(count, x.shape, ())
    return lax.select(keep, x, lax.full_like(x, 0.0))
