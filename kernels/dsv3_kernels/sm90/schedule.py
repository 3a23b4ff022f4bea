"""Which tiles a persistent thread block computes, one after the other.

The grid has as many clusters as fit on the GPU at once. Each walks the tiles with a stride of that number, so the tiles
in flight at any time are neighbours; all warpgroups of a block walk the same way and need not talk about it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dsv3_kernels.sm90.tile import Tile

Carry = Any


class Work(NamedTuple):
    """One tile of the output: int32 scalars, or None where the operand has no leading axis."""

    row: Any
    """First row of a, and of the output."""
    column: Any
    """First row of b: the output's first column."""
    first_block: Any
    """Where the contraction starts, in blocks of 128."""
    num_blocks: Any
    """How many blocks it has; 0 makes zeros."""
    a_lead: Any = None
    b_lead: Any = None
    out_lead: Any = None
    valid_rows: Any = None
    """Rows from the start of the group that count; those behind come out as zeros."""


class Position(NamedTuple):
    """Where a thread block is among all."""

    cluster_id: Any
    num_clusters: int
    rank: Any
    """Which block of its cluster it is."""


class Grid(NamedTuple):
    """Tiles of one output matrix, counted in clusters."""

    tile: Tile
    rows: Any
    """An int, or int32 where it is known to the GPU only."""
    columns: int

    @property
    def size(self) -> int:
        """Clusters that cover the matrix."""
        return self.rows * self.columns

    def corner(self, index: Any, rank: Any) -> tuple[Any, Any]:
        """First row and column of the tile of block `rank` in cluster `index`.

        `group` rows of tiles are walked down, then the next column: about as many rows of a as of b are read by the
        blocks that run at one time, and come from memory once.
        """
        group = self.tile.group
        panel, inside = divide(index, group * self.columns)
        height = lax.min(jnp.int32(group), jnp.int32(self.rows) - panel * group)
        column, row = divide(inside, height)
        row = row + panel * group
        if self.tile.cluster == "m":
            row = row * 2 + rank
        if self.tile.cluster == "n":
            column = column * 2 + rank
        return row * self.tile.block_m, column * self.tile.block_n


def make_grid(tile: Tile, rows: int, columns: int) -> Grid:
    """The grid of an output of `rows` x `columns` elements; edge tiles may reach beyond it."""
    per_row = tile.block_m * (2 if tile.cluster == "m" else 1)
    per_column = tile.block_n * (2 if tile.cluster == "n" else 1)
    return Grid(tile, -(-rows // per_row), -(-columns // per_column))


def for_each(
    position: Position, total: Any, visit: Callable[[Any, Carry], Carry], carry: Carry, *, offset: Any = 0
) -> Carry:
    """carry = visit(index, carry) for this cluster's share of 0 ... total - 1, dealt out from cluster `offset` on."""
    clusters = jnp.int32(position.num_clusters)
    first = lax.rem(position.cluster_id + clusters - offset, clusters)
    count = lax.div(lax.max(total - first, jnp.int32(0)) + clusters - 1, clusters)
    return lax.fori_loop(jnp.int32(0), count, lambda i, carry: visit(first + i * clusters, carry), carry)


def divide(x: Any, y: Any) -> tuple[Any, Any]:
    """Quotient and remainder of int32 numbers that are not negative."""
    y = jnp.int32(y)
    return lax.div(x, y), lax.rem(x, y)
