"""The tile of a GEMM kernel: its sizes, who computes which part of it, and the shared memory it takes."""

import dataclasses
import math

import jax
import jax.numpy as jnp

BLOCK_K = 128
"""Elements of the contraction in one stage: those that share a scale, and the width of a 128-byte swizzle."""
CONSUMERS = 2
"""Warpgroups that multiply; a third one loads."""
SHARED_LIMIT = 232448
"""Bytes of shared memory a block of an H100 can have (227 KiB)."""
RESERVED = 2048
"""Of that, for barriers and the alignment of buffers to a swizzle's period."""
SCALES_PER_STAGE = 32
"""Scales of 128x128 blocks fetched in a stage: as few as make the 128 bytes that Mosaic copies at least."""
SWIZZLES = (128, 64, 32)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes that change how fast a product is, never what it is.

    A block of 64 rows is split between the two consumers by columns, a taller one by rows. Each consumer multiplies 64
    rows at a time: with 256 rows it does so twice a stage and keeps both sums.
    """

    block_m: int
    block_n: int
    stages: int
    cluster: str = ""
    """"m" or "n": two blocks side by side along that axis share the other operand by multicast; "": none do."""
    group: int = 8
    """Rows of tiles that are walked down before the next column of tiles, so that both operands stay in L2."""
    split_k: int = 1
    """Parts of the contraction computed by different blocks, where there are too few tiles to fill the GPU."""

    def __post_init__(self) -> None:
        if self.block_m not in (64, 128, 256):
            raise ValueError(f"block_m={self.block_m} must be 64, 128 or 256.")
        if self.cluster not in ("", "m", "n"):
            raise ValueError(f"cluster={self.cluster!r} must be '', 'm' or 'n'.")
        width = self.columns
        if width % 16 or not 16 <= width <= 256 or self.block_n % CONSUMERS:
            raise ValueError(f"block_n={self.block_n} gives a consumer {width} columns; they must be 16, 32, ..., 256.")
        if min(self.stages, self.group, self.split_k) < 1 or self.stages > 32:
            raise ValueError(f"{self} needs 1 to 32 stages, and group and split_k of at least 1.")
        if self.cluster and self.split_k > 1:
            raise ValueError(f"{self} has both a cluster and split_k; blocks of a cluster share one part of K.")

    @property
    def columns(self) -> int:
        """Columns of one consumer."""
        return self.block_n if self.block_m >= 128 else self.block_n // CONSUMERS

    @property
    def waves(self) -> int:
        """Times 64 rows that one consumer multiplies each stage."""
        return max(1, self.block_m // (64 * CONSUMERS))

    @property
    def cluster_size(self) -> int:
        """Thread blocks in a cluster."""
        return 2 if self.cluster else 1

    @property
    def name(self) -> str:
        """Such as "256x128 s4 cn g8" or "64x64 s8 k4"."""
        cluster = f" c{self.cluster}" if self.cluster else ""
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        return f"{self.block_m}x{self.block_n} s{self.stages}{cluster} g{self.group}{split}"


def output_chunk(columns: int, dtype: jax.typing.DTypeLike) -> tuple[int, int]:
    """Columns written to shared memory at a time, and their swizzle in bytes.

    The widest swizzle that divides a row; 128 bytes at a time where that is possible, else the whole row.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(bytes_ for bytes_ in SWIZZLES if columns * size % bytes_ == 0)
    return (swizzle // size if swizzle == 128 else columns), swizzle


def output_slots(tile: Tile, dtype: jax.typing.DTypeLike, *, is_b_scaled_by_row: bool) -> int:
    """Chunks of a consumer that can be on their way to memory at once: as many as fit beside the stages.

    A divisor of the chunks of a tile, so that every tile begins with slot 0. 0 if not even one fits.
    """
    width, _ = output_chunk(tile.columns, dtype)
    chunks = tile.waves * (tile.columns // width)
    free = SHARED_LIMIT - RESERVED - tile.stages * stage_bytes(tile, is_b_scaled_by_row=is_b_scaled_by_row)
    fitting = free // (CONSUMERS * 64 * width * jnp.dtype(dtype).itemsize)
    return max((slots for slots in range(1, chunks + 1) if chunks % slots == 0 and slots <= fitting), default=0)


def stage_bytes(tile: Tile, *, is_b_scaled_by_row: bool) -> int:
    """Shared memory of one stage: both operands and their scales."""
    scales = tile.block_m + (tile.block_n if is_b_scaled_by_row else SCALES_PER_STAGE)
    return (tile.block_m + tile.block_n) * BLOCK_K + 4 * scales


def scale_runs(tile: Tile) -> int:
    """Columns of a consumer that surely share a scale of 128x128 blocks, wherever the tile begins."""
    aligned = math.gcd(tile.block_n, BLOCK_K)
    return math.gcd(tile.columns, aligned)
