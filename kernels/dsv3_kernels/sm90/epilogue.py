"""The end of a tile: sums go through shared memory to the output, while the next tile is already under way.

A consumer writes chunks of 64 rows into slots of its own and has them copied out without waiting. It waits before it
writes a slot again: for that the copy that reads it must be the only one that can be unfinished, or older than those
that may be. `commit_smem` makes the writes of all threads of the consumer visible to the copy (a fence between the
proxies, then a barrier of the warpgroup), and the copy is issued by one of them after that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.sm90.mainloop import consumer_offsets, swizzled
from dsv3_kernels.sm90.schedule import Work
from dsv3_kernels.sm90.tile import CONSUMERS, Tile, output_chunk, output_slots


def staging_type(tile: Tile, dtype: jax.typing.DTypeLike, *, is_b_scaled_by_row: bool) -> Any:
    """Shared memory for chunks on their way out: [consumers, slots, 64, columns]."""
    chunk, swizzle = output_chunk(tile.columns, dtype)
    slots = output_slots(tile, dtype, is_b_scaled_by_row=is_b_scaled_by_row)
    if not slots:
        raise ValueError(f"tile {tile.name} does not fit in shared memory with {jnp.dtype(dtype).name} outputs.")
    return plgpu.SMEM((CONSUMERS, slots, 64, chunk), dtype, transforms=swizzled(swizzle, jnp.dtype(dtype).itemsize))


def store_tile(
    tile: Tile, sums: list[list[Any]], out: Any, staging: Any, work: Work, consumer: Any, *, adds: bool
) -> None:
    """Starts copying this consumer's part of a tile to `out`, or adding it there; what lies outside is dropped."""
    chunk, _ = output_chunk(tile.columns, out.dtype)
    slots = staging.shape[1]
    index = 0
    for wave in range(tile.waves):
        whole = sums[wave][0] if len(sums[wave]) == 1 else lax.concatenate(sums[wave], 1)
        row, column = consumer_offsets(tile, consumer, wave)
        first_row = work.row + row
        if work.valid_rows is not None:
            whole = _keep_rows(whole, work.valid_rows - first_row)
        for start in range(0, tile.columns, chunk):
            # Chunks take the slots in turn, in this tile and the next, so the oldest of `slots` copies used this one.
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            part = lax.slice(whole, (0, start), (64, start + chunk)) if chunk < tile.columns else whole
            slot = staging.at[consumer, index % slots]
            slot[...] = part.astype(out.dtype)
            plgpu.commit_smem()
            there = (pl.ds(first_row, 64), pl.ds(work.column + column + start, chunk))
            target = out.at[there] if work.out_lead is None else out.at[(work.out_lead, *there)]
            plgpu.copy_smem_to_gmem(slot, target, reduction_op="add" if adds else None)
            index += 1


def finish_stores() -> None:
    """Waits until nothing reads the staging memory any more."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _keep_rows(x: Any, count: Any) -> Any:
    """The first `count` rows of x [64, columns], zeros behind (also where x is NaN)."""
    rows = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    keep = rows < lax.broadcast_in_dim(count, x.shape, ())
    return lax.select(keep, x, lax.full_like(x, 0.0))
