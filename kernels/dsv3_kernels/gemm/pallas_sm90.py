"""The dense FP8 GEMM for Hopper GPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_kernels import launch, tiles
from dsv3_kernels.aot.case import FP8_MMA, AotCase
from dsv3_kernels.operands import row_tile
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90 import kernel, padding, shapes
from dsv3_kernels.sm90.schedule import Carry, Position, Work, for_each, make_grid
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
    """The implementation for sm_90a of `dsv3_kernels.gemm.api.fp8_gemm`.

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
    num_sms = launch.num_sms(num_sms)
    tile = tile.within(num_sms)
    out = padding.padded_output(tile, (M, N), out_dtype)
    result = kernel.gemm(
        "fp8_gemm",
        padding.padded_operands(a, b),
        (),
        tile=tile,
        walk=_walk(tile, M, N, -(-K // BLOCK_K)),
        out=out,
        accumulate_into=None if accumulate_into is None else padding.pad_to(accumulate_into, out.shape),
        is_b_scaled_by_row=is_b_scaled_by_row,
        num_sms=num_sms,
        interpret=interpret,
    )
    return padding.cut_to(result, (M, N))


def aot_cases() -> list[AotCase]:
    """Each tile of the table, weight gradients with sums to add to; the input gradient of the latents."""
    latents = tiles.dense(4096, 7168, 2112, out_dtype=jnp.bfloat16, is_b_scaled_by_row=False)
    of_latents = _aot_case(latents, tiles.choose(tiles.DENSE, latents))
    return [
        *(_aot_case(problem, tile) for problem, tile in tiles.tuned_tiles(tiles.DENSE)),
        of_latents._replace(name=f"{of_latents.name} whole rows of scales"),
    ]


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
    """All tiles; with split_k each block of a cluster takes its part of the contraction of the same one."""
    grid = make_grid(tile, rows, columns)
    per_part = -(-blocks // tile.split_k)

    def walk(_: tuple[Any, ...], position: Position, visit: kernel.Visit, carry: Carry) -> Carry:
        first, count = jnp.int32(0), jnp.int32(blocks)
        if tile.split_k > 1:
            first = lax.min(position.rank * per_part, count)
            count = lax.min(jnp.int32(per_part), count - first)

        def one(index: Any, carry: Carry) -> Carry:
            return visit(Work(*grid.corner(index, position.rank), first, count), carry)

        return for_each(position, jnp.int32(grid.size), one, carry)

    return walk
