"""The bf16 GEMMs of experts for Hopper GPUs: one persistent kernel, two orders of tiles, operands as they are stored.

Three warpgroups, as in `dsv3_kernels.sm90.kernel`: two consumers with 232 registers a thread, of which 128 hold sums,
and a producer with 40.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsv3_kernels import launch
from dsv3_kernels.aot.case import BF16_MMA, AotCase
from dsv3_kernels.grouped_gemm_bf16.limits import UNIT
from dsv3_kernels.grouped_gemm_bf16.pallas_mainloop import (
    BLOCK_K,
    Layout,
    load_tile,
    multiply_tile,
    release_before,
    ring_types,
)
from dsv3_kernels.sm90 import epilogue
from dsv3_kernels.sm90.kernel import (
    CONSUMER_REGISTERS,
    GRID_AXIS,
    PRODUCER,
    PRODUCER_REGISTERS,
    THREAD_AXIS,
)
from dsv3_kernels.sm90.mainloop import swizzled
from dsv3_kernels.sm90.padding import cut_to, pad_to
from dsv3_kernels.sm90.schedule import Carry, Position, Work, divide, for_each, make_grid
from dsv3_kernels.sm90.tile import CONSUMERS, Tile, output_chunk

STAGING_SLOTS = 2
"""Chunks of a consumer that can be on their way to memory at once: a divisor of those of a tile, if it has as many."""

WIDE, NARROW, FEW_ROWS = Tile(128, 256, 4), Tile(128, 128, 6), Tile(64, 256, 4)

Visit = Callable[[Work, Any, Carry], Carry]
"""(tile, how many of its units are stored, carry) -> carry."""


def choose_tile(units: int, num_groups: int, columns: int) -> Tile:
    """The tile for `units` blocks of 64 rows, of which each group wastes less than one."""
    if units <= 2 * num_groups:
        return FEW_ROWS
    return WIDE if columns > NARROW.block_n else NARROW


def grouped_matmul(
    rows: Float[Array, "M A"],
    weights: Float[Array, "G _ _"],
    block_group: Int[Array, "M_blocks"],
    *,
    transposed: bool,
    out_dtype: jax.typing.DTypeLike,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M Z"]:
    """The implementation for sm_90a of `dsv3_kernels.grouped_gemm_bf16.api.grouped_matmul`.

    A tile of 128 rows begins where a group does, or 128 rows further. If the group has but 64 rows left, the other
    consumer multiplies rows of the next group, and does not store them.
    """
    M, K = rows.shape
    G, N = weights.shape[0], weights.shape[1 if transposed else 2]
    units = M // UNIT
    tile = tile or choose_tile(units, G, N)
    layout = Layout(is_a_k_first=False, is_b_k_first=not transposed)
    first_units, groups, heights, count = tile_lists(
        jnp.repeat(block_group, units // block_group.shape[0], total_repeat_length=units), tile.block_m // UNIT
    )
    grid = make_grid(tile, M, N)
    blocks = -(-K // BLOCK_K)

    def walk(lists: tuple[Any, ...], position: Position, visit: Visit, carry: Carry) -> Carry:
        first_ref, group_ref, height_ref, count_ref = lists
        used = grid._replace(rows=count_ref[0])

        def one(index: Any, carry: Carry) -> Carry:
            row, column = used.corner(index, position.rank)
            i = lax.div(row, jnp.int32(tile.block_m))
            group = group_ref[i]
            length = lax.select(group < 0, jnp.int32(0), jnp.int32(blocks))
            work = Work(first_ref[i] * UNIT, column, jnp.int32(0), length, b_lead=lax.max(group, jnp.int32(0)))
            return visit(work, height_ref[i], carry)

        return for_each(position, count_ref[0] * grid.columns, one, carry)

    padded = jax.ShapeDtypeStruct((M, _full(N)), out_dtype)
    out = _gemm(
        "grouped_matmul",
        pad_to(rows, (M, _full(K))),
        pad_to(weights, (G, *map(_full, weights.shape[1:]))),
        (first_units, groups, heights, count),
        tile=tile,
        layout=layout,
        walk=walk,
        out=padded,
        num_sms=launch.num_sms(num_sms),
        interpret=interpret,
    )
    return cut_to(out, (M, N))


def grouped_matmul_k(
    a: Float[Array, "M A"],
    b: Float[Array, "M Z"],
    block_group: Int[Array, "M_blocks"],
    *,
    num_groups: int,
    out_dtype: jax.typing.DTypeLike,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "G A Z"]:
    """The implementation for sm_90a of `dsv3_kernels.grouped_gemm_bf16.api.grouped_matmul_k`.

    Both operands are contracted along their rows as they are: the tensor cores read 16-bit elements in either order.
    """
    (M, A), Z = a.shape, b.shape[1]
    tile = tile or (WIDE if NARROW.block_n < Z else NARROW)
    per_block = M // UNIT // block_group.shape[0]
    is_member = block_group[None, :] == jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    starts = jnp.argmax(is_member, axis=1).astype(jnp.int32) * per_block
    counts = is_member.sum(axis=1, dtype=jnp.int32) * per_block
    grid = make_grid(tile, A, Z)

    def walk(lists: tuple[Any, ...], position: Position, visit: Visit, carry: Carry) -> Carry:
        def one(index: Any, carry: Carry) -> Carry:
            group, inside = divide(index, grid.size)
            row, column = grid.corner(inside, position.rank)
            work = Work(row, column, lists[0][group], lists[1][group], out_lead=group)
            return visit(work, jnp.int32(tile.block_m // UNIT), carry)

        return for_each(position, jnp.int32(grid.size * num_groups), one, carry)

    out = _gemm(
        "grouped_matmul_k",
        pad_to(a, (M, _full(A))),
        pad_to(b, (M, _full(Z))),
        (starts, counts),
        tile=tile,
        layout=Layout(is_a_k_first=True, is_b_k_first=True),
        walk=walk,
        out=jax.ShapeDtypeStruct((num_groups, _full(A), _full(Z)), out_dtype),
        num_sms=launch.num_sms(num_sms),
        interpret=interpret,
    )
    return cut_to(out, (num_groups, A, Z))


def tile_lists(unit_group: Int[Array, "M_units"], height: int) -> tuple[Array, Array, Array, Array]:
    """First unit, group and number of units of each tile, [M_units] each; how many tiles there are, [1].

    A run of units of one group becomes tiles of `height` units; the last may have fewer.
    """
    units = unit_group.shape[0]
    index = jnp.arange(units, dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(min(units, 1), bool), unit_group[1:] != unit_group[:-1]])
    run_start = lax.cummax(jnp.where(is_first, index, 0))
    starts_tile = (index - run_start) % height == 0
    rank = jnp.cumsum(starts_tile, dtype=jnp.int32)
    first = jnp.full(units, units, jnp.int32).at[jnp.where(starts_tile, rank - 1, units)].set(index, mode="drop")
    group = unit_group.at[first].get(mode="clip")
    same = [unit_group.at[first + i].get(mode="fill", fill_value=-2) == group for i in range(1, height)]
    heights = jnp.ones(units, jnp.int32) + sum(each.astype(jnp.int32) for each in same)
    return first, group, heights, rank[-1:]


def _gemm(
    name: str,
    a: jax.Array,
    b: jax.Array,
    lists: tuple[jax.Array, ...],
    *,
    tile: Tile,
    layout: Layout,
    walk: Callable[[tuple[Any, ...], Position, Visit, Carry], Carry],
    out: jax.ShapeDtypeStruct,
    num_sms: int,
    interpret: Any,
) -> jax.Array:
    """The output of all tiles that `walk` visits, each by one thread block."""
    chunk, swizzle = output_chunk(tile.columns, out.dtype)
    size = jnp.dtype(out.dtype).itemsize
    slots = min(STAGING_SLOTS, tile.columns // chunk)
    staging_type = plgpu.SMEM((CONSUMERS, slots, 64, chunk), out.dtype, transforms=swizzled(swizzle, size))
    types, tree = jax.tree.flatten(ring_types(tile, layout))

    def body(a_ref: Any, b_ref: Any, *refs: Any) -> None:
        list_refs, (out_ref, staging, *ring_refs) = refs[: len(lists)], refs[len(lists) :]
        ring = jax.tree.unflatten(tree, ring_refs)
        position = Position(lax.axis_index(GRID_AXIS), num_sms, jnp.int32(0))
        warpgroup = lax.axis_index(THREAD_AXIS)

        @pl.when(warpgroup == PRODUCER)
        def _produce() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def visit(work: Work, height: Any, slot: Any) -> Any:
                return load_tile(tile, layout, a_ref, b_ref, ring, work, slot)

            walk(list_refs, position, visit, jnp.int32(0))

            @pl.loop(0, tile.stages)
            def _await(slot: Any) -> None:
                plgpu.barrier_wait(ring.empty.at[slot])

        @pl.when(warpgroup < PRODUCER)
        def _consume() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            @pl.loop(0, tile.stages - 1)
            def _arrive(slot: Any) -> None:
                plgpu.barrier_arrive(ring.empty.at[slot])

            def visit(work: Work, height: Any, slot: Any) -> Any:
                slot, sums = multiply_tile(tile, layout, ring, work, slot, warpgroup)
                unit = jnp.int32(0) if tile.block_m == UNIT else warpgroup

                @pl.when(unit < height)
                def _store() -> None:
                    epilogue.store_tile(tile, [[sums]], out_ref, staging, work, warpgroup, adds=False)

                return slot

            slot = walk(list_refs, position, visit, jnp.int32(0))
            release_before(tile, ring, slot)
            epilogue.finish_stores()

    body.__name__ = name
    kernel = launch.kernel(
        body,
        out_type=out,
        grid=(num_sms,),
        grid_names=(GRID_AXIS,),
        num_threads=CONSUMERS + 1,
        thread_name=THREAD_AXIS,
        scratch_types=[staging_type, *types],
        # Slots are handed over by the barriers of the ring and the waits of `epilogue`; threads read no shared memory.
        has_own_barriers=True,
        interpret=interpret,
    )
    return kernel(a, b, *lists)


def _full(size: int) -> int:
    """`size` in full rows of a swizzle: no operand of the model is padded."""
    return -(-size // BLOCK_K) * BLOCK_K


def aot_cases() -> list[AotCase]:
    """Each tile in each direction, at the sizes of V2-Lite's experts, and those of V3 for the widest."""
    return [
        *(_aot_rows(tile, transposed) for tile in (WIDE, NARROW, FEW_ROWS) for transposed in (False, True)),
        *(_aot_weights(tile, dtype) for tile in (WIDE, NARROW) for dtype in (jnp.bfloat16, jnp.float32)),
    ]


def _aot_rows(tile: Tile, transposed: bool) -> AotCase:
    rows, weights = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16), (64, 2048, 2816)
    weights = jax.ShapeDtypeStruct((64, 2816, 2048) if transposed else weights, jnp.bfloat16)
    function = partial(grouped_matmul, transposed=transposed, out_dtype=jnp.bfloat16, tile=tile)
    name = f"grouped_matmul {tile.name}{' transposed' if transposed else ''}"
    return AotCase(name, function, (rows, weights, jax.ShapeDtypeStruct((128,), jnp.int32)), (BF16_MMA,))


def _aot_weights(tile: Tile, dtype: jax.typing.DTypeLike) -> AotCase:
    a, b = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((8192, 2816), jnp.bfloat16)
    function = partial(grouped_matmul_k, num_groups=64, out_dtype=dtype, tile=tile)
    name = f"grouped_matmul_k {tile.name} {jnp.dtype(dtype).name}"
    return AotCase(name, function, (a, b, jax.ShapeDtypeStruct((128,), jnp.int32)), (BF16_MMA,))
