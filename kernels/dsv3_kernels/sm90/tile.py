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
"""Of that, for barriers and the list of groups of a grouped contraction."""
ALIGNMENT = 1024
"""Bytes that Mosaic rounds each buffer up to."""
PANEL = 4
"""Columns of scales that are copied at a time: the 16 bytes of a row that TMA copies at least, for 4 blocks of K."""
MOST_WHOLE = 20
"""Columns of scales of which a panel may hold whole rows."""
SCALE_ROWS = 4
"""Rows of scales that are copied as one where a panel holds whole rows: 16 bytes, whatever a row has."""
BLOCK_SCALE_ROWS, WHOLE_BLOCK_SCALE_ROWS = 8, 32
"""Rows of scales of 128x128 blocks in a panel, and in one of whole rows: as few as make full 128 bytes, which Mosaic
copies. A tile needs up to 3, which are among them also where copies start at a multiple of 4."""
SWIZZLES = (128, 64, 32, 16)
MOST_PARTS = 8
"""Blocks of a cluster that every Hopper GPU can run."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes that change how fast a matmul is, never its result.

    A block of 64 rows is split between the two consumers by columns, a taller one by rows. Each consumer multiplies 64
    rows at a time: with 256 rows it does so twice a stage and holds both sums.
    """

    block_m: int
    block_n: int
    stages: int
    cluster: str = ""
    """"m" or "n": two blocks side by side along that axis share the other operand by multicast; "": none do."""
    group: int = 8
    """Rows of tiles that are walked down before the next column of tiles, so that both operands stay in L2."""
    split_k: int = 1
    """Blocks of a cluster that share a tile, each with a part of the contraction, where tiles are few and K is long."""

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
            raise ValueError(
                f"{self} has both a cluster and split_k; parts of a contraction are a cluster of their own."
            )
        if self.split_k > MOST_PARTS or width % (8 * self.split_k):
            raise ValueError(
                f"split_k={self.split_k} must be 1 to {MOST_PARTS}, and each part adds up 8, 16, ... of the {width} "
                "columns of a consumer."
            )

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
        return 2 if self.cluster else self.split_k

    @property
    def output_columns(self) -> int:
        """Columns that one consumer writes: those that it adds up where other blocks have parts of them."""
        return self.columns // self.split_k

    @property
    def column_scales(self) -> int:
        """Scales of a consumer's columns where each has its own, in full runs of the 64 that are moved at a time."""
        return -(-self.columns // 64) * 64

    def within(self, num_sms: int) -> "Tile":
        """This tile, or blocks on their own where a cluster needs more SMs than there are."""
        return self if self.cluster_size <= num_sms else dataclasses.replace(self, cluster="", split_k=1)

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


def output_slots(tile: Tile, dtype: jax.typing.DTypeLike, *, contraction: int, is_b_scaled_by_row: bool) -> int:
    """Chunks of a consumer that can be on their way to memory at once: as many as fit beside the ring.

    A divisor of the chunks of a tile, so that every tile begins with slot 0. 0 if not even one fits.
    """
    width, _ = output_chunk(tile.output_columns, dtype)
    chunks = tile.waves * (tile.output_columns // width)
    free = SHARED_LIMIT - RESERVED - ring_bytes(tile, contraction=contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    fitting = free // ALIGNMENT * ALIGNMENT // (CONSUMERS * 64 * width * jnp.dtype(dtype).itemsize)
    return max((slots for slots in range(1, chunks + 1) if chunks % slots == 0 and slots <= fitting), default=0)


def ring_bytes(tile: Tile, *, contraction: int, is_b_scaled_by_row: bool) -> int:
    """Shared memory of the stages, the panels of scales and the scales of columns."""
    width = panel_columns(contraction, is_b_scaled_by_row=is_b_scaled_by_row)
    a_scales, b_scales = tile.block_m, b_scale_rows(tile, width, is_b_scaled_by_row=is_b_scaled_by_row)
    panels = num_panels(tile, width)
    buffers = [
        tile.stages * tile.block_m * BLOCK_K,
        tile.stages * tile.block_n * BLOCK_K,
        *(panels * rows * width * 4 for rows in (a_scales, b_scales)),
        CONSUMERS * 2 * PANEL * tile.column_scales * 4 if is_b_scaled_by_row else 0,
    ]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in buffers)


def panel_columns(contraction: int, *, is_b_scaled_by_row: bool) -> int:
    """Columns of scales in a panel: 4, or all where rows are short and of no full 16 bytes (K = 2112 has 17)."""
    blocks = -(-contraction // BLOCK_K)
    is_whole = blocks % PANEL and blocks <= MOST_WHOLE and not is_b_scaled_by_row
    return blocks if is_whole else PANEL


def num_panels(tile: Tile, width: int) -> int:
    """Panels in shared memory: of the block that is multiplied, the last of its panel, and all that follow it."""
    return -(-(tile.stages - 1) // width) + 1


def b_scale_rows(tile: Tile, width: int, *, is_b_scaled_by_row: bool) -> int:
    """Rows of a panel of scales of b: with one a row, those of the last consumer in full runs."""
    if is_b_scaled_by_row:
        return tile.block_n - tile.columns + tile.column_scales
    return BLOCK_SCALE_ROWS if width == PANEL else WHOLE_BLOCK_SCALE_ROWS


def clusters_at_once(num_sms: int, size: int) -> int:
    """Clusters of `size` blocks that surely run at once; at least one.

    A cluster lies within one group of SMs (GPC). On Hopper those have 16 or 18, so that pairs fill all of them, and
    larger clusters 16 of each.
    """
    groups = num_sms // 16
    return max(1, groups * (16 // size) if size > 2 and groups else num_sms // size)


def scale_runs(tile: Tile) -> int:
    """Columns of a consumer that surely share a scale of 128x128 blocks, wherever the tile begins."""
    aligned = math.gcd(tile.block_n, BLOCK_K)
    return math.gcd(tile.columns, aligned)
