"""The FP8 GEMMs of experts for Hopper GPUs: one kernel, three orders of tiles."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dsv3_kernels import launch, tiles
from dsv3_kernels.aot.case import FP8_MMA, AotCase
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90 import kernel, padding, shapes
from dsv3_kernels.sm90.schedule import Carry, Position, Work, divide, for_each, make_grid
from dsv3_kernels.sm90.tile import BLOCK_K, Tile
from dsv3_kernels.tiles.model import Problem

IDS_AT_ONCE = 8


def grouped_fp8_gemm(
    a: QTensor,
    b: QTensor,
    block_group: Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """The implementation for sm_90a of `dsv3_kernels.grouped_gemm.api.grouped_fp8_gemm`.

    A tile lies within one block of 128 rows, so it has one group; blocks of a cluster share the rows of a.
    """
    (M, K), N = a.values.shape, b.values.shape[1]
    num_sms = launch.num_sms(num_sms)
    tile = (tile or tiles.choose(tiles.CONTIGUOUS, tiles.contiguous(M, N, K, out_dtype=out_dtype))).within(num_sms)
    _check_tile("grouped_fp8_gemm", tile, 128)
    blocks = -(-K // BLOCK_K)
    grid = make_grid(tile, M, N)

    def walk(lists: tuple[Any, ...], position: Position, visit: kernel.Visit, carry: Carry) -> Carry:
        def one(index: Any, carry: Carry) -> Carry:
            row, column = grid.corner(index, position.rank)
            group = lists[0][lax.div(row, jnp.int32(128))]
            count = lax.select(group < 0, jnp.int32(0), jnp.int32(blocks))
            return visit(Work(row, column, jnp.int32(0), count, b_lead=lax.max(group, jnp.int32(0))), carry)

        return for_each(position, jnp.int32(grid.size), one, carry)

    return _run("grouped_fp8_gemm", a, b, (block_group,), tile, walk, (M, N), out_dtype, num_sms, interpret)


def grouped_fp8_gemm_masked(
    a: QTensor,
    b: QTensor,
    valid_rows: Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "G M N"]:
    """The implementation for sm_90a of `dsv3_kernels.grouped_gemm.api.grouped_fp8_gemm_masked`.

    First all tiles that have valid rows are dealt out, group after group, then those that are filled with zeros: both
    kinds evenly, whatever the sizes of the groups.
    """
    (G, M, K), N = a.values.shape, b.values.shape[1]
    num_sms = launch.num_sms(num_sms)
    tile = (tile or tiles.choose(tiles.MASKED, tiles.masked(G, M, N, K, out_dtype=out_dtype))).within(num_sms)
    _check_tile("grouped_fp8_gemm_masked", tile, 256)
    blocks = -(-K // BLOCK_K)
    grid = make_grid(tile, M, N)

    def walk(lists: tuple[Any, ...], position: Position, visit: kernel.Visit, carry: Carry) -> Carry:
        def group_tiles(group: Any, carry: Any) -> Any:
            offset, inner = carry
            valid = lists[0][group]
            rows = lax.div(valid + tile.block_m - 1, jnp.int32(tile.block_m))
            used = grid._replace(rows=rows)

            def one(index: Any, carry: Carry) -> Carry:
                row, column = used.corner(index, position.rank)
                return visit(Work(row, column, jnp.int32(0), jnp.int32(blocks), group, group, group, valid), carry)

            total = rows * grid.columns
            inner = for_each(position, total, one, inner, offset=offset)
            return lax.rem(offset + total, jnp.int32(position.num_clusters)), inner

        def group_zeros(group: Any, carry: Any) -> Any:
            offset, inner = carry
            rows = lax.div(lists[0][group] + tile.block_m - 1, jnp.int32(tile.block_m))
            unused = grid._replace(rows=grid.rows - rows)

            def one(index: Any, carry: Carry) -> Carry:
                row, column = unused.corner(index, position.rank)
                row = row + rows * tile.block_m
                return visit(Work(row, column, jnp.int32(0), jnp.int32(0), group, group, group), carry)

            total = (grid.rows - rows) * grid.columns
            inner = for_each(position, total, one, inner, offset=offset)
            return lax.rem(offset + total, jnp.int32(position.num_clusters)), inner

        carry = lax.fori_loop(jnp.int32(0), jnp.int32(G), group_tiles, (jnp.int32(0), carry))
        return lax.fori_loop(jnp.int32(0), jnp.int32(G), group_zeros, carry)[1]

    return _run("grouped_fp8_gemm_masked", a, b, (valid_rows,), tile, walk, (G, M, N), out_dtype, num_sms, interpret)


def grouped_fp8_gemm_k(
    a: QTensor,
    b: QTensor,
    block_group: Array,
    accumulate_into: Array | None = None,
    *,
    num_groups: int,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "G M N"]:
    """The implementation for sm_90a of `dsv3_kernels.grouped_gemm.api.grouped_fp8_gemm_k`.

    Where a group's blocks begin and how many there are the producer finds out, from `block_group`, before it loads.
    """
    (M, K), N = a.values.shape, b.values.shape[0]
    num_sms = launch.num_sms(num_sms)
    tile = (tile or tiles.choose(tiles.CONTRACTION, tiles.contraction(num_groups, M, N, K))).within(num_sms)
    grid = make_grid(tile, M, N)
    out = padding.padded_output(tile, (num_groups, M, N), jnp.float32)

    def walk(lists: tuple[Any, ...], position: Position, visit: kernel.Visit, carry: Carry) -> Carry:
        def one(index: Any, carry: Carry) -> Carry:
            group, inside = divide(index, grid.size)
            row, column = grid.corner(inside, position.rank)
            ranges = lists[1]
            count = ranges[1, group] - ranges[0, group]
            return visit(Work(row, column, ranges[0, group], count, out_lead=group), carry)

        return for_each(position, jnp.int32(grid.size * num_groups), one, carry)

    result = kernel.gemm(
        "grouped_fp8_gemm_k",
        padding.padded_operands(a, b),
        (block_group,),
        tile=tile,
        walk=walk,
        out=out,
        plan=_ranges(num_groups, K // BLOCK_K),
        accumulate_into=None if accumulate_into is None else padding.pad_to(accumulate_into, out.shape),
        is_b_scaled_by_row=True,
        num_sms=num_sms,
        interpret=interpret,
    )
    return padding.cut_to(result, (num_groups, M, N))


def _ranges(num_groups: int, blocks: int) -> kernel.Plan:
    """First block of each group and the one behind its last, int32 [2, num_groups]; 0 and 0 for a group without."""

    def make(lists: tuple[Any, ...], plan: tuple[Any, ...]) -> None:
        (ids,), (ranges,) = lists, plan

        @pl.loop(0, num_groups)
        def _clear(group: Any) -> None:
            ranges[0, group] = jnp.int32(0)
            ranges[1, group] = jnp.int32(0)

        plgpu.commit_smem()  # no thread clears what another one has found

        def known(group: Any) -> Any:
            return lax.select((group >= 0) & (group < num_groups), group, jnp.int32(-1))

        def look(i: Any, before: Any) -> Any:
            # Loads of several ids are under way at once: one by one each would take as long as all.
            blocks_here = [i * IDS_AT_ONCE + j for j in range(IDS_AT_ONCE)]
            found = [known(ids[lax.min(block, jnp.int32(blocks - 1))]) for block in blocks_here]
            for block, group in zip(blocks_here, found, strict=True):
                changes = (block < blocks) & (group != before)

                @pl.when(changes & (before >= 0))
                def _end(block: Any = block, before: Any = before) -> None:
                    ranges[1, before] = block

                @pl.when(changes & (group >= 0))
                def _begin(block: Any = block, group: Any = group) -> None:
                    ranges[0, group] = block

                before = group
            return before

        last = lax.fori_loop(jnp.int32(0), jnp.int32(-(-blocks // IDS_AT_ONCE)), look, jnp.int32(-1))

        @pl.when(last >= 0)
        def _end() -> None:
            ranges[1, last] = jnp.int32(blocks)

    return kernel.Plan((plgpu.SMEM((2, num_groups), jnp.int32),), make)


def aot_cases() -> list[AotCase]:
    """Each tile of the table, sums over the contraction with sums to add to."""
    return [
        *(_aot_contiguous(problem, tile) for problem, tile in tiles.tuned_tiles(tiles.CONTIGUOUS)),
        *(_aot_masked(problem, tile) for problem, tile in tiles.tuned_tiles(tiles.MASKED)),
        *(_aot_contraction(problem, tile) for problem, tile in tiles.tuned_tiles(tiles.CONTRACTION)),
    ]


def _aot_contiguous(problem: Problem, tile: Tile) -> AotCase:
    m, n, k = problem.m, problem.n, problem.k
    args = (shapes.operand((m, k), 1), shapes.operand((4, n, k), BLOCK_K), shapes.integers(m // 128))
    function = partial(grouped_fp8_gemm, out_dtype=jnp.bfloat16, tile=tile)
    return AotCase(f"grouped_fp8_gemm {tile.name}", function, args, (FP8_MMA,))


def _aot_masked(problem: Problem, tile: Tile) -> AotCase:
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    args = (shapes.operand((groups, m, k), 1), shapes.operand((groups, n, k), BLOCK_K), shapes.integers(groups))
    function = partial(grouped_fp8_gemm_masked, out_dtype=jnp.bfloat16, tile=tile)
    return AotCase(f"grouped_fp8_gemm_masked {tile.name}", function, args, (FP8_MMA,))


def _aot_contraction(problem: Problem, tile: Tile) -> AotCase:
    m, n, groups, k = problem.m, problem.n, problem.groups, problem.k * problem.groups

    def add(a: QTensor, b: QTensor, block_group: Array, c: Array) -> Array:
        return grouped_fp8_gemm_k(a, b, block_group, num_groups=groups, accumulate_into=c, tile=tile)

    args = (shapes.operand((m, k), 1), shapes.operand((n, k), 1), shapes.integers(k // BLOCK_K))
    out = jax.ShapeDtypeStruct((groups, m, n), jnp.float32)
    return AotCase(f"grouped_fp8_gemm_k_added {tile.name}", add, (*args, out), (FP8_MMA,))


def _run(
    op: str,
    a: QTensor,
    b: QTensor,
    lists: tuple[Array, ...],
    tile: Tile,
    walk: kernel.Walk,
    shape: tuple[int, ...],
    out_dtype: jax.typing.DTypeLike,
    num_sms: int,
    interpret: Any,
) -> jax.Array:
    """A matmul with weights that share scales in 128x128 blocks."""
    result = kernel.gemm(
        op,
        padding.padded_operands(a, b),
        lists,
        tile=tile,
        walk=walk,
        out=padding.padded_output(tile, shape, out_dtype),
        is_b_scaled_by_row=False,
        num_sms=num_sms,
        interpret=interpret,
    )
    return padding.cut_to(result, shape)


def _check_tile(op: str, tile: Tile, max_rows: int) -> None:
    if tile.block_m > max_rows or tile.cluster == "m" or tile.split_k > 1:
        raise NotImplementedError(f"{op}: tile {tile.name} has two groups in a cluster, or parts of K; choose another.")
