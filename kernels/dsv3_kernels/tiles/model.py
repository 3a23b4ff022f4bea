"""How long a GEMM should take with a tile, from the widths of an H100's pipes: a model, to choose tiles without a GPU.

It was fitted to nothing. It orders tiles by what they cost in the tensor cores, shared memory, L2, memory and idle SMs;
a table made on a GPU replaces it (`dsv3_kernels.tuning`), which times the best of two rates of L2: that rate decides
the order of large tiles, and nobody publishes it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_kernels.sm90.tile import BLOCK_K, CONSUMERS, Tile, clusters_at_once, output_chunk, output_slots
from dsv3_kernels.target import H100_SMS

SMS = H100_SMS
CLOCK = 1.755e9
"""Cycles a second under load."""
FMA_PER_CYCLE = 4096
"""FP8 multiply-adds of an SM's tensor cores: 1.9 PFLOPS over all SMs at that clock."""
LANES = 128
SHARED_BYTES_PER_CYCLE = 128
L2_WIDE = 8e12 / 1.3e9 / SMS
"""Bytes a cycle of one SM while all read, 46.6: 8 TB/s at 1.3 GHz, by which DeepGEMM chooses its own tiles. It makes
every rate that DeepGEMM published possible, so the model chooses by it."""
L2_NARROW = 26.0
"""The same at 6 TB/s and full clock. It makes a quarter of the published rates impossible, but is the one that asks for
tiles which read less: taller ones, and clusters."""
MEMORY_BYTES_PER_SECOND = 3.0e12
LOAD_LATENCY = 1000
"""Cycles from a slot's release to its next operands, which come from memory: with few slots, consumers wait."""
STAGE_LATENCY = 150
"""Cycles between the end of a consumer's matmuls and its next ones, besides adding them up."""
FIRST_LATENCY = 1500
"""Cycles from the launch of a block to its first matmul."""
STORE_LATENCY = 300
"""Cycles from a tile's last matmul to the next tile's first, besides writing it out."""
STORE_BYTES_PER_CYCLE = 64
"""Of the copies from shared memory to the output, which a consumer waits for when all its slots are full."""
EXCHANGE_LATENCY = 2500
"""Cycles in which the blocks of a cluster signal each other that their parts of a split contraction are in L2, and read
those of the others."""
FEWEST_STAGES, MOST_STAGES = 3, 10


class Problem(NamedTuple):
    """`groups` matmuls of [m, k] by [n, k]ᵀ in one kernel; of weights shared by all rows if `groups` is 1."""

    m: int
    n: int
    k: int
    groups: int = 1
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16
    is_b_scaled_by_row: bool = False
    max_block_m: int = 256
    """128 where rows of one tile, or of one cluster, might otherwise belong to two groups."""
    max_block_n: int = 192


def seconds(problem: Problem, tile: Tile, *, l2: float = L2_WIDE) -> float:
    """Modelled time of a kernel at a rate of L2; what it shares with every tile (launch, scales) is left out."""
    return _cost(problem, tile, l2)[0]


def candidates(problem: Problem, *, l2: float = L2_WIDE) -> list[Tile]:
    """All tiles that serve the problem and fit, the fastest of the model first."""
    return sorted(_tiles(problem), key=lambda tile: _order(problem, tile, l2))


@functools.cache
def best_tile(problem: Problem) -> Tile:
    """The fastest of the model."""
    return min(_tiles(problem), key=lambda tile: _order(problem, tile, L2_WIDE))


def shortlist(problem: Problem, count: int) -> list[Tile]:
    """The `count` best by either rate of L2, in turn, each once: what is worth timing.

    Of tiles that differ in stages alone one is enough, that with the most; more of them are others if that costs slots.
    """
    by_rate = [_first_of_each_kind(problem, candidates(problem, l2=l2))[:count] for l2 in (L2_WIDE, L2_NARROW)]
    return list(dict.fromkeys(itertools.chain.from_iterable(zip(*by_rate))))


def slots(problem: Problem, tile: Tile) -> int:
    """Chunks of this output that a consumer has on their way at once; 0 for a tile without room for any."""
    return output_slots(tile, problem.out_dtype, contraction=problem.k, is_b_scaled_by_row=problem.is_b_scaled_by_row)


def _order(problem: Problem, tile: Tile, l2: float) -> tuple[float, float, int, int, str]:
    """Fastest first; where memory decides alone, those with the fewest cycles; then small tiles, and many stages."""
    return (*_cost(problem, tile, l2), tile.block_m * tile.block_n, -tile.stages, tile.name)


def _cost(problem: Problem, tile: Tile, l2: float) -> tuple[float, float]:
    """Seconds of the kernel, and cycles of an SM.

    A tile takes as long as its consumers compute and write it out, or as its operands take to come: those of the next
    tile come in the meantime, as far as there are slots for them.
    """
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    per_row = tile.block_m * (2 if tile.cluster == "m" else 1)
    per_column = tile.block_n * (2 if tile.cluster == "n" else 1)
    clusters = groups * -(-m // per_row) * -(-n // per_column)
    waves = -(-clusters // clusters_at_once(SMS, tile.cluster_size))
    steps = -(-k // BLOCK_K // tile.split_k)
    fetched = tile.block_m / (2 if tile.cluster == "n" else 1) + tile.block_n / (2 if tile.cluster == "m" else 1)
    fetch = fetched * BLOCK_K / l2
    epilogue = _epilogue_cycles(problem, tile, l2)
    computed = steps * _step_cycles(problem, tile) + epilogue
    loaded = steps * fetch + max(0.0, epilogue - tile.stages * fetch)
    cycles = FIRST_LATENCY + waves * max(computed, loaded)
    moved = groups * (m * k + n * k + m * n * jnp.dtype(problem.out_dtype).itemsize)
    return max(cycles / CLOCK, moved / MEMORY_BYTES_PER_SECOND), cycles


def _step_cycles(problem: Problem, tile: Tile) -> float:
    """Cycles of 128 elements of the contraction of one tile, L2 aside, by the pipe that takes longest."""
    rows, columns = tile.block_m, tile.block_n
    area = rows * columns
    tensor = area * BLOCK_K / FMA_PER_CYCLE
    adding = area * (2 if problem.is_b_scaled_by_row else 1) / LANES
    multiplied = CONSUMERS * tile.waves * (64 + tile.columns)
    shared = (multiplied + rows + columns) * BLOCK_K / SHARED_BYTES_PER_CYCLE
    alone = tensor / CONSUMERS + adding + STAGE_LATENCY * tile.waves
    return max(tensor, adding, shared, alone, (LOAD_LATENCY + alone) / tile.stages)


def _epilogue_cycles(problem: Problem, tile: Tile, l2: float) -> float:
    """Cycles of writing a tile to shared memory, and of waiting until chunks beyond the slots have left it.

    With a split contraction a block first writes its part of the tile to L2, and reads as much of all parts.
    """
    dtype, columns, area = problem.out_dtype, tile.output_columns, tile.block_m * tile.block_n
    size = area // tile.split_k * jnp.dtype(dtype).itemsize
    chunks = tile.waves * (columns // output_chunk(columns, dtype)[0])
    waiting = size * (1 - slots(problem, tile) / chunks) / STORE_BYTES_PER_CYCLE
    exchange = EXCHANGE_LATENCY + 2 * area * 4 / l2 if tile.split_k > 1 else 0
    return STORE_LATENCY + exchange + size / SHARED_BYTES_PER_CYCLE + waiting


def _first_of_each_kind(problem: Problem, tiles: list[Tile]) -> list[Tile]:
    """The tiles without those that have the shape and slots of an earlier one."""
    first: dict[tuple[Tile, int], Tile] = {}
    for tile in tiles:
        first.setdefault((dataclasses.replace(tile, stages=1), slots(problem, tile)), tile)
    return list(first.values())


def _tiles(problem: Problem) -> Iterator[Tile]:
    for block_m, widths in _widths(problem.is_b_scaled_by_row).items():
        if not _is_useful_height(problem, block_m):
            continue
        for block_n in filter(lambda width: width <= problem.max_block_n, widths):
            for cluster in ("", "n", "m") if problem.max_block_m > 128 else ("", "n"):
                for split_k in (1, 2, 4, 8) if _may_split(problem) and not cluster else (1,):
                    columns = Tile(block_m, block_n, FEWEST_STAGES).columns
                    if split_k * 4 > max(4, problem.k // BLOCK_K) or columns % (8 * split_k):
                        continue
                    for stages in range(FEWEST_STAGES, MOST_STAGES + 1):
                        tile = Tile(block_m, block_n, stages, cluster, split_k=split_k)
                        if slots(problem, tile) and not _is_half_idle(problem, tile):
                            yield tile


def _is_useful_height(problem: Problem, block_m: int) -> bool:
    """Whether rows may share a tile, no half of it is empty, and low tiles do not read the weights too often."""
    is_half_empty = block_m > 64 and problem.m <= block_m // 2
    return block_m <= problem.max_block_m and not is_half_empty and (block_m > 64 or problem.m <= 64 * 8)


def _widths(is_b_scaled_by_row: bool) -> dict[int, tuple[int, ...]]:
    """Few widths, each for a reason: powers of two, divisors of the model's shapes, the widest without a spill."""
    if is_b_scaled_by_row:
        return {64: (64, 128), 128: (64, 96, 128, 160)}
    return {64: (32, 64, 96, 128, 192), 128: (64, 96, 112, 128, 160, 176, 192), 256: (96, 112, 128)}


def _may_split(problem: Problem) -> bool:
    """Few rows of one matmul: too few tiles, and sums that are small beside the weights."""
    return problem.groups == 1 and problem.max_block_m > 128 and problem.m <= 256


def _is_half_idle(problem: Problem, tile: Tile) -> bool:
    """Whether a cluster would have a block without work."""
    if tile.cluster == "m":
        return -(-problem.m // tile.block_m) == 1
    return tile.cluster == "n" and -(-problem.n // tile.block_n) == 1
