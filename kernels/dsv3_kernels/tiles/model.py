"""How long a GEMM should take with a tile, from the widths of an H100's pipes: a model, to choose tiles without a GPU.

It was fitted to nothing. It orders tiles by what they cost in the tensor cores, shared memory, L2, memory and idle SMs;
a table made on a GPU replaces it (`dsv3_kernels.tuning`).
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_kernels.sm90.tile import BLOCK_K, CONSUMERS, Tile, output_chunk, output_slots

SMS = 132
CLOCK = 1.755e9
"""Cycles a second under load."""
FMA_PER_CYCLE = 4096
"""FP8 multiply-adds of an SM's tensor cores: 1.9 PFLOPS over all SMs at that clock."""
LANES = 128
SHARED_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 26
"""Of one SM while all read: about 6 TB/s together."""
MEMORY_BYTES_PER_SECOND = 3.0e12
STAGE_LATENCY = 150
"""Cycles between the end of a consumer's products and its next ones, besides adding them up."""
FIRST_LATENCY = 1500
"""Cycles from the launch of a block to its first product."""
REDUCTION_SECONDS = 2.5e-6
"""A kernel that adds up the parts of a split contraction."""
MOST_STAGES = 10


class Problem(NamedTuple):
    """`groups` products of [m, k] by [n, k]ᵀ in one kernel; of weights shared by all rows if `groups` is 1."""

    m: int
    n: int
    k: int
    groups: int = 1
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16
    is_b_scaled_by_row: bool = False
    max_block_m: int = 256
    """128 where rows of one tile, or of one cluster, might otherwise belong to two groups."""
    max_block_n: int = 192


def seconds(problem: Problem, tile: Tile) -> float:
    """Modelled time of a kernel; what it shares with every tile (launch, scales) is left out."""
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    per_row = tile.block_m * (2 if tile.cluster == "m" else 1)
    per_column = tile.block_n * (2 if tile.cluster == "n" else 1)
    tiles = groups * -(-m // per_row) * -(-n // per_column) * tile.split_k
    waves = -(-tiles // (SMS // tile.cluster_size))
    steps = -(-k // BLOCK_K // tile.split_k)
    item = 4 if tile.split_k > 1 else jnp.dtype(problem.out_dtype).itemsize
    epilogue = 300 + tile.block_m * tile.block_n * item / 64
    cycles = FIRST_LATENCY + waves * (steps * step_cycles(problem, tile) + epilogue)
    moved = groups * (m * k + n * k + m * n * item * tile.split_k)
    total = max(cycles / CLOCK, moved / MEMORY_BYTES_PER_SECOND)
    return total + REDUCTION_SECONDS if tile.split_k > 1 else total


def step_cycles(problem: Problem, tile: Tile) -> float:
    """Cycles of 128 elements of the contraction of one tile, by the pipe that takes longest."""
    rows, columns = tile.block_m, tile.block_n
    area = rows * columns
    tensor = area * BLOCK_K / FMA_PER_CYCLE
    adding = area * (2 if problem.is_b_scaled_by_row else 1) / LANES
    multiplied = CONSUMERS * tile.waves * (64 + tile.columns)
    shared = (multiplied + rows + columns) * BLOCK_K / SHARED_BYTES_PER_CYCLE
    fetched = rows / (2 if tile.cluster == "n" else 1) + columns / (2 if tile.cluster == "m" else 1)
    alone = tensor / CONSUMERS + adding + STAGE_LATENCY * tile.waves
    return max(tensor, adding, shared, fetched * BLOCK_K / L2_BYTES_PER_CYCLE, alone)


def candidates(problem: Problem) -> list[Tile]:
    """All tiles that serve the problem and fit, the fastest of the model first."""
    return sorted(_tiles(problem), key=lambda tile: (seconds(problem, tile), tile.block_m * tile.block_n, tile.name))


def best_tile(problem: Problem) -> Tile:
    """The fastest of the model."""
    return candidates(problem)[0]


def _tiles(problem: Problem) -> Iterator[Tile]:
    for block_m, widths in _widths(problem.is_b_scaled_by_row).items():
        if block_m > problem.max_block_m or (block_m == 64 and problem.m > 64 * 8):
            continue
        for block_n in filter(lambda width: width <= problem.max_block_n, widths):
            for cluster in ("", "n", "m") if problem.max_block_m > 128 else ("", "n"):
                for split_k in (1, 2, 4, 8) if _may_split(problem) and not cluster else (1,):
                    if split_k * 4 > max(4, problem.k // BLOCK_K):
                        continue
                    tile = _with_stages(problem, Tile(block_m, block_n, 1, cluster, split_k=split_k))
                    if tile is not None and not _is_half_idle(problem, tile):
                        yield tile


def _widths(is_b_scaled_by_row: bool) -> dict[int, tuple[int, ...]]:
    """Few widths, each for a reason: powers of two, widths that divide the model's shapes, the widest without a spill.

    Scales of rows are copied by 32.
    """
    if is_b_scaled_by_row:
        return {64: (64, 128), 128: (64, 96, 128, 160)}
    return {64: (32, 64, 128), 128: (64, 96, 112, 128, 160, 176, 192), 256: (96, 112, 128)}


def _may_split(problem: Problem) -> bool:
    """Few rows of one product: too few tiles, and partial sums that are small beside the weights."""
    return problem.groups == 1 and problem.max_block_m > 128 and problem.m <= 256


def _with_stages(problem: Problem, tile: Tile) -> Tile | None:
    """As many stages as leave room for two chunks of output, or for one where 3 stages would not."""
    dtype = jnp.float32 if tile.split_k > 1 else problem.out_dtype
    chunks = tile.waves * (tile.columns // output_chunk(tile.columns, dtype)[0])
    for wanted in (min(2, chunks), 1):
        for stages in range(MOST_STAGES, 3, -1):
            staged = dataclasses.replace(tile, stages=stages)
            if output_slots(staged, dtype, is_b_scaled_by_row=problem.is_b_scaled_by_row) >= wanted:
                return staged
    return None


def _is_half_idle(problem: Problem, tile: Tile) -> bool:
    """Whether a cluster would have a block without work."""
    if tile.cluster == "m":
        return -(-problem.m // tile.block_m) == 1
    return tile.cluster == "n" and -(-problem.n // tile.block_n) == 1
