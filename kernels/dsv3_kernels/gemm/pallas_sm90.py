"""The dense FP8 GEMM for Hopper GPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_kernels import tiles
from dsv3_kernels.aot.case import FP8_MMA, AotCase
from dsv3_kernels.operands import row_tile
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90 import kernel, padding, shapes
from dsv3_kernels.sm90.schedule import Carry, Position, Work, divide, for_each, make_grid
from dsv3_kernels.sm90.tile import BLOCK_K, Tile
from dsv3_kernels.tiles.model import Problem


def fp8_gemm(
    a: QTensor,
    b: QTensor,
    accumulate_into: Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    tile: Tile | None = None,
    num_sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """The form for sm_90a of `dsv3_kernels.gemm.api.fp8_gemm`.

    Args:
        tile: None for that of the tuned table.
        num_sms: thread blocks that run at once; None for those of the GPU.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU.
    """
    (M, K), N = a.values.shape, b.values.shape[0]
    is_b_scaled_by_row = row_tile(b) == 1
    if tile is None:
        problem = tiles.dense(M, N, K, out_dtype=out_dtype, is_b_scaled_by_row=is_b_scaled_by_row)
        tile = tiles.choose(tiles.DENSE, problem)
    parts = tile.split_k
    shape, dtype = ((M, N), out_dtype) if parts == 1 else ((parts, M, N), jnp.float32)
    out = padding.padded_output(tile, shape, dtype)
    buffer = None if accumulate_into is None or parts > 1 else padding.pad_to(accumulate_into, out.shape)
    result = kernel.gemm(
        "fp8_gemm",
        padding.padded_operands(a, b),
        (),
        tile=tile,
        walk=_walk(tile, M, N, -(-K // BLOCK_K)),
        out=out,
        accumulate_into=buffer,
        is_b_scaled_by_row=is_b_scaled_by_row,
        num_sms=num_sms or tiles.num_sms(),
        interpret=interpret,
    )
    result = padding.cut_to(result, shape)
    if parts == 1:
        return result
    total = result.sum(0)
    return (total if accumulate_into is None else total + accumulate_into).astype(out_dtype)


def aot_cases() -> list[AotCase]:
    """Each tile of the table, weight gradients with sums to add to."""
    return [_aot_case(problem, tile) for problem, tile in tiles.tuned_tiles(tiles.DENSE)]


def _aot_case(problem: Problem, tile: Tile) -> AotCase:
    m, n, k, by_row = problem.m, problem.n, problem.k, problem.is_b_scaled_by_row
    args = (shapes.operand((m, k), 1), shapes.operand((n, k), 1 if by_row else BLOCK_K))
    if by_row:

        def add(a: QTensor, b: QTensor, c: Array) -> Array:
            return fp8_gemm(a, b, out_dtype=jnp.float32, accumulate_into=c, tile=tile)

        args = (*args, jax.ShapeDtypeStruct((m, n), jnp.float32))
        return AotCase(f"fp8_gemm_added {tile.name}", add, args, (FP8_MMA,))
    return AotCase(f"fp8_gemm {tile.name}", partial(fp8_gemm, out_dtype=jnp.bfloat16, tile=tile), args, (FP8_MMA,))


def _walk(tile: Tile, rows: int, columns: int, blocks: int) -> kernel.Walk:
    """All tiles; with split_k all of one part of the contraction, then all of the next."""
    grid = make_grid(tile, rows, columns)
    per_part = -(-blocks // tile.split_k)

    def walk(_: tuple[Any, ...], position: Position, visit: kernel.Visit, carry: Carry) -> Carry:
        def one(index: Any, carry: Carry) -> Carry:
            if tile.split_k == 1:
                return visit(Work(*grid.corner(index, position.rank), jnp.int32(0), jnp.int32(blocks)), carry)
            part, inside = divide(index, grid.size)
            first = part * per_part
            count = lax.max(lax.min(jnp.int32(per_part), blocks - first), jnp.int32(0))
            return visit(Work(*grid.corner(inside, position.rank), first, count, out_lead=part), carry)

        return for_each(position, jnp.int32(grid.size * tile.split_k), one, carry)

    return walk
