"""A persistent, warp-specialised GEMM kernel, given the order in which its blocks visit the tiles.

Three warpgroups: two consumers, which multiply and promote with 232 registers a thread, and a producer, which starts
the copies with 40. Together 504 of the 512 registers that 128 lanes of an SM have for each other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import launch
from dsv3_kernels.sm90 import epilogue, mainloop
from dsv3_kernels.sm90.mainloop import CLUSTER_AXIS, Operands
from dsv3_kernels.sm90.schedule import Carry, Position, Work
from dsv3_kernels.sm90.tile import CONSUMERS, Tile

PRODUCER = CONSUMERS
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
GRID_AXIS, THREAD_AXIS = "grid", "warpgroup"

Visit = Callable[[Work, Carry], Carry]
Walk = Callable[[tuple[Any, ...], Position, Visit, Carry], Carry]


def gemm(
    name: str,
    operands: Operands,
    lists: tuple[jax.Array, ...],
    *,
    tile: Tile,
    walk: Walk,
    out: jax.ShapeDtypeStruct,
    accumulate_into: jax.Array | None = None,
    is_b_scaled_by_row: bool,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """The output of all tiles that `walk` visits, each by one thread block.

    Args:
        operands: arrays as `Operands` says, padded to what copies need: rows of values to 8, of scales to 4.
        lists: int32 arrays that `walk` reads.
        walk: walk(refs of the lists, position, visit, carry) calls carry = visit(work, carry) for each tile of the
            thread block at that position, and returns the last carry.
        out: shape and dtype; rows a multiple of 8, columns a multiple of what one row of a swizzle holds.
        accumulate_into: float32 of that shape that the products are added to, in its memory if it is donated.
        is_b_scaled_by_row: whether rows of b have scales of their own, or share them by 128.
        num_sms: how many thread blocks run at once, rounded down to whole clusters.
    """
    # The interpreter cannot add to memory, and a kernel has no references that vary over a mesh: there the sum is made
    # outside.
    adds = accumulate_into is not None and interpret is None and not _varies(accumulate_into)

    types = mainloop.ring_types(tile, is_b_scaled_by_row=is_b_scaled_by_row)._replace(fences_reads=None)
    ring_types, ring_tree = jax.tree.flatten(types)

    def body(*refs: Any) -> None:
        gmem, refs = Operands(*refs[:4]), refs[4:]
        list_refs, refs = refs[: len(lists)], refs[len(lists) :]
        out_ref, staging, *ring_refs = refs
        ring = jax.tree.unflatten(ring_tree, ring_refs)._replace(fences_reads=interpret is not None)
        rank = lax.axis_index(CLUSTER_AXIS) if tile.cluster else jnp.int32(0)
        position = Position(lax.axis_index(GRID_AXIS), num_sms // tile.cluster_size, rank)
        warpgroup = lax.axis_index(THREAD_AXIS)

        @pl.when(warpgroup == PRODUCER)
        def _produce() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def visit(work: Work, slot: Any) -> Any:
                return mainloop.load_tile(tile, gmem, ring, work, slot, is_b_scaled_by_row=is_b_scaled_by_row)

            walk(list_refs, position, visit, jnp.int32(0))
            mainloop.every_slot(tile.stages, lambda slot: mainloop.await_empty(ring, slot))

        @pl.when(warpgroup < PRODUCER)
        def _consume() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            mainloop.every_slot(tile.stages, lambda slot: mainloop.arrive_empty(ring, slot))

            def visit(work: Work, slot: Any) -> Any:
                slot, sums = mainloop.multiply_tile(
                    tile, ring, work, slot, warpgroup, is_b_scaled_by_row=is_b_scaled_by_row
                )
                epilogue.store_tile(tile, sums, out_ref, staging, work, warpgroup, adds=adds)
                return slot

            walk(list_refs, position, visit, jnp.int32(0))
            epilogue.finish_stores()

    body.__name__ = name
    kernel = launch.kernel(
        body,
        out_type=() if adds else out,
        grid=(num_sms // tile.cluster_size,),
        grid_names=(GRID_AXIS,),
        cluster=(2,) if tile.cluster else (),
        cluster_names=(CLUSTER_AXIS,) if tile.cluster else (),
        num_threads=CONSUMERS + 1,
        thread_name=THREAD_AXIS,
        scratch_types=[
            epilogue.staging_type(tile, out.dtype, is_b_scaled_by_row=is_b_scaled_by_row),
            *ring_types,
        ],
        # Slots are handed over by the barriers of `mainloop` and the waits of `epilogue`, and no thread reads what it
        # or another thread wrote.
        has_own_barriers=True,
        interpret=interpret,
    )
    if accumulate_into is None:
        return kernel(*operands, *lists)
    if not adds:
        return accumulate_into + kernel(*operands, *lists)
    buffer = jax.new_ref(accumulate_into)
    kernel(*operands, *lists, buffer)
    return jax.freeze(buffer)


def _varies(x: jax.Array) -> bool:
    """Whether x differs between devices inside `jax.shard_map`; the type that says so was renamed in jax 0.12."""
    kind = jax.typeof(x)
    return bool(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)
