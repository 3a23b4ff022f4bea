"""A persistent, warp-specialised GEMM kernel, given the order in which its blocks visit the tiles.

Three warpgroups: two consumers, which multiply and promote with 232 registers a thread, and a producer, which starts
the copies with 40. Together 504 of the 512 registers that 128 lanes of an SM have for each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import launch
from dsv3_kernels.sm90 import epilogue, mainloop
from dsv3_kernels.sm90.mainloop import CLUSTER_AXIS, Operands
from dsv3_kernels.sm90.schedule import Carry, Position, Work
from dsv3_kernels.sm90.tile import CONSUMERS, PANEL, Tile, clusters_at_once, panel_columns

PRODUCER = CONSUMERS
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
GRID_AXIS, THREAD_AXIS = "grid", "warpgroup"

Visit = Callable[[Work, Carry], Carry]
Walk = Callable[[tuple[Any, ...], Position, Visit, Carry], Carry]


class Plan(NamedTuple):
    """What the walk wants to know and must be found out first: by the producer, before any tile, in shared memory."""

    types: tuple[Any, ...]
    """Shared memory for it."""
    make: Callable[[tuple[Any, ...], tuple[Any, ...]], None]
    """make(refs of the lists, refs of that memory)."""


def gemm(
    name: str,
    operands: Operands,
    lists: tuple[jax.Array, ...],
    *,
    tile: Tile,
    walk: Walk,
    out: jax.ShapeDtypeStruct,
    accumulate_into: jax.Array | None = None,
    plan: Plan | None = None,
    is_b_scaled_by_row: bool,
    num_sms: int,
    interpret: Any = None,
) -> jax.Array:
    """The output of all tiles that `walk` visits, each by one thread block, or by one cluster with `tile.split_k`.

    Args:
        operands: arrays as in `Operands`, padded to what copies need (`padding`).
        lists: int32 arrays that `walk` reads.
        walk: walk(refs of the lists and of the plan, position, visit, carry) calls carry = visit(work, carry) for each
            tile of the thread block at that position, and returns the last carry.
        out: shape and dtype; rows a multiple of 8, columns a multiple of what one row of a swizzle holds.
        accumulate_into: float32 of that shape that the results are added to, in its memory if it is donated.
        plan: what is made of the lists for the walk.
        is_b_scaled_by_row: whether rows of b have scales of their own, or share them by 128.
        num_sms: how many thread blocks run at once, rounded down to whole clusters.
    """
    # The interpreter cannot add to memory: there the sum is made outside.
    adds = accumulate_into is not None and interpret is None
    num_clusters = clusters_at_once(num_sms, tile.cluster_size)

    contraction = operands.a.shape[-1]
    partial = epilogue.partial_type(tile, out.shape)
    out_types = [*(() if adds else (out,)), *(() if partial is None else (partial,))]
    settings = {"contraction": contraction, "is_b_scaled_by_row": is_b_scaled_by_row}
    ring_types = mainloop.ring_types(tile, **settings)._replace(fences_reads=None, copies_by_four=None)
    if interpret is None and panel_columns(contraction, is_b_scaled_by_row=is_b_scaled_by_row) != PANEL:
        operands = mainloop.by_fours(operands)

    def body(*refs: Any) -> None:
        *gmem, staging, ring, written, plan_refs = refs
        operand_refs, list_refs, outs = Operands(*gmem[:4]), tuple(gmem[4 : 4 + len(lists)]), gmem[4 + len(lists) :]
        ring = ring._replace(fences_reads=interpret is not None, copies_by_four=interpret is None)
        exchange = None if partial is None else epilogue.Exchange(outs[1], written, fences=interpret is None)
        rank = lax.axis_index(CLUSTER_AXIS) if tile.cluster_size > 1 else jnp.int32(0)
        position = Position(lax.axis_index(GRID_AXIS), num_clusters, rank)
        warpgroup = lax.axis_index(THREAD_AXIS)

        def known() -> tuple[Any, ...]:
            """The lists and the plan, once that is made."""
            if plan_refs is None:
                return list_refs
            plan, is_made = plan_refs
            plgpu.barrier_wait(is_made)
            return (*list_refs, *plan)

        @pl.when(warpgroup == PRODUCER)
        def _produce() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            if plan is not None:
                plan.make(list_refs, plan_refs[0])
                plgpu.barrier_arrive(plan_refs[1])

            def visit(work: Work, place: Any) -> Any:
                return mainloop.load_tile(tile, operand_refs, ring, work, place, **settings)

            walk(known(), position, visit, mainloop.first_place())
            mainloop.await_all(ring)

        @pl.when(warpgroup < PRODUCER)
        def _consume() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            mainloop.release_all(ring)

            def visit(work: Work, place: Any) -> Any:
                place, sums = mainloop.multiply_tile(tile, ring, work, place, warpgroup, **settings)
                if exchange is not None:
                    sums = epilogue.add_parts(tile, sums, exchange, work, warpgroup, rank)
                epilogue.store_tile(tile, sums, outs[0], staging, work, warpgroup, part=rank, adds=adds)
                return place

            walk(known(), position, visit, mainloop.first_place())
            epilogue.finish_stores()

    body.__name__ = name
    kernel = launch.kernel(
        body,
        out_type=out_types,
        grid=(num_clusters,),
        grid_names=(GRID_AXIS,),
        cluster=(tile.cluster_size,) if tile.cluster_size > 1 else (),
        cluster_names=(CLUSTER_AXIS,) if tile.cluster_size > 1 else (),
        num_threads=CONSUMERS + 1,
        thread_name=THREAD_AXIS,
        scratch_types=[
            epilogue.staging_type(tile, out.dtype, **settings),
            ring_types,
            None if partial is None else epilogue.written_type(),
            None if plan is None else (plan.types, plgpu.Barrier(num_arrivals=1)),
        ],
        # Slots are handed over by the barriers of `mainloop` and the waits of `epilogue`; where threads read what
        # others wrote (scales of columns, the plan), there is a barrier as well.
        has_own_barriers=True,
        interpret=interpret,
    )
    if accumulate_into is None:
        return kernel(*operands, *lists)[0]
    if not adds:
        return accumulate_into + kernel(*operands, *lists)[0]
    buffer = jax.new_ref(accumulate_into)
    kernel(*operands, *lists, buffer)
    return jax.freeze(buffer)
