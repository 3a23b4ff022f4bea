"""Every tile is computed by exactly one thread block, whatever the shape, the cluster and the number of SMs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels.sm90.schedule import Position, for_each, make_grid
from dsv3_kernels.sm90.tile import Tile, clusters_at_once


def _visits(tile, rows, columns, num_sms):
    """How often each tile corner was visited, by all blocks."""
    grid = make_grid(tile, rows, columns)
    clusters = num_sms // tile.cluster_size
    height, width = -(-rows // tile.block_m) + 1, -(-columns // tile.block_n) + 1
    counts = np.zeros((height, width), int)
    for cluster in range(clusters):
        for rank in range(tile.cluster_size):
            position = Position(jnp.int32(cluster), clusters, jnp.int32(rank))

            def visit(index, counts, rank=rank):
                row, column = grid.corner(index, jnp.int32(rank))
                return counts.at[row // tile.block_m, column // tile.block_n].add(1)

            counts += np.asarray(for_each(position, jnp.int32(grid.size), visit, jnp.zeros((height, width), int)))
    return counts


@pytest.mark.parametrize("cluster", ["", "m", "n"])
def test_each_tile_is_visited_once(cluster, rng):
    rows, columns = (int(size) for size in rng.integers(1, 2000, 2))
    tile = Tile(128, 128, 2, cluster, group=int(rng.integers(1, 9)))
    counts = jax.device_get(_visits(tile, rows, columns, num_sms=6))
    inside = counts[: -(-rows // 128), : -(-columns // 128)]
    assert (inside == 1).all(), (rows, columns, tile)
    assert counts.sum() - inside.sum() <= max(counts.shape)  # blocks of a cluster beyond the edge


def test_offset_deals_on_where_the_last_list_ended():
    def visited(cluster, total, offset):
        return np.asarray(
            for_each(
                Position(jnp.int32(cluster), 5, jnp.int32(0)),
                jnp.int32(total),
                lambda index, seen: seen.at[index].add(1),
                jnp.zeros(max(total, 1), int),
                offset=jnp.int32(offset),
            )
        )

    first = [visited(cluster, 7, 0).sum() for cluster in range(5)]
    second = [visited(cluster, 8, 7 % 5).sum() for cluster in range(5)]
    assert first == [2, 2, 1, 1, 1]
    assert [a + b for a, b in zip(first, second)] == [3] * 5
    assert sum(visited(cluster, 0, 3).sum() for cluster in range(5)) == 0


def test_tile_that_cannot_be_is_refused():
    for wrong in (
        {"block_m": 96},
        {"block_n": 24},
        {"block_m": 64, "block_n": 48},
        {"cluster": "x"},
        {"stages": 0},
        {"cluster": "n", "split_k": 2},
        {"split_k": 16},
        {"block_n": 96, "split_k": 8},
    ):
        with pytest.raises(ValueError):
            Tile(**{"block_m": 128, "block_n": 128, "stages": 4, **wrong})


def test_clusters_fit_the_multiprocessors_that_may_be_used():
    assert [clusters_at_once(132, size) for size in (1, 2, 4, 8)] == [132, 66, 32, 16]
    assert [clusters_at_once(sms, 4) for sms in (4, 15, 100)] == [1, 3, 24]
    assert Tile(64, 64, 4, split_k=4).within(3) == Tile(64, 64, 4)
    assert Tile(128, 64, 4, "n").within(2).cluster == "n"
