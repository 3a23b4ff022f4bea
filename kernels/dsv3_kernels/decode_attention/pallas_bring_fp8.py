"""Pages of the FP8 cache on their way into shared memory: the bringer loads, dequantises to BF16 and stores.

E4M3 passes through registers, so it needs no shared memory, of which BF16 pages leave none. The loads of a few strips
are under way while one is dequantised and stored, so that arithmetic hides their latency. 16 neighbouring lanes
load one row of a piece, 8 bytes each, and store 16 bytes each: both are whole lines.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.pallas_bring import (
    STEPS,
    BringPair,
    announce,
    await_empty,
    has_rope,
    pages_of,
    tokens_of,
)
from dsv3_kernels.decode_attention.pallas_layout import LATENT, NUM_PIECES, PAGE, PIECE, ROPE, Scratch, Segment
from dsv3_kernels.latent_cache.fp8_rows import ROPE_BYTE

STRIP = 32
"""Rows of a piece that are loaded together."""

AHEAD = 3
"""Strips whose loads are under way while one is dequantised; more would spill registers."""


STRIPS = [
    (slot, half, piece, pl.ds(first, STRIP))
    for slot, half in STEPS
    for piece in [2 * half, 2 * half + 1] + [NUM_PIECES] * has_rope(slot, half)
    for first in range(0, PAGE, STRIP)
]


def _rows_by_lanes(num_columns: int) -> Any:
    """A warp takes whole rows, a lane 8 neighbours."""
    rows = 32 * 8 // num_columns
    tiling = plgpu.Tiling(((4 * rows, num_columns), (rows, num_columns), (8,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def fp8_pages(values, scales, rope, table, s: Scratch) -> BringPair:
    """Pages of 656-byte rows, seen as E4M3 [N, 64, 656], float32 [N, 64, 164] and BF16 [N, 64, 328]."""
    latent_layout, rope_layout = _rows_by_lanes(PIECE), _rows_by_lanes(ROPE)

    def load(page, piece: int, rows) -> tuple:
        if piece == NUM_PIECES:
            return (_load(rope.at[page, rows, pl.ds(ROPE_BYTE // 2, ROPE)], rope_layout),)
        value = _load(values.at[page, rows, pl.ds(piece * PIECE, PIECE)], latent_layout)
        return value, _load(scales.at[page, rows, LATENT // 4 + piece], latent_layout.reduce(1))

    def store(loaded, slot, piece: int, rows, num_tokens) -> None:
        if piece == NUM_PIECES:
            target, layout = s.k_rope.at[slot, rows], rope_layout
            (numbers,) = loaded
        else:
            target, layout = s.kv.at[slot, piece, rows], latent_layout
            value, scale = loaded
            numbers = value.astype(jnp.float16).astype(jnp.float32) * _across(scale, PIECE, layout)
        target[...] = numbers.astype(jnp.bfloat16)

        @pl.when(num_tokens < rows.start + STRIP)
        def _():  # each thread zeroes what it wrote itself
            row = plgpu.broadcasted_iota(jnp.int32, target.shape, 0, layout=layout)
            is_token = row < num_tokens - rows.start
            target[...] = jnp.where(is_token, plgpu.load(target, layout=layout), jnp.bfloat16(0))

    def bring_pair(seg: Segment, i, is_first) -> None:
        num_tokens = tokens_of(seg, i)
        pages = pages_of(table, values.shape[0], seg, i)  # without tokens, too: none of its rows will count
        zero = lax.optimization_barrier(jnp.int32(0))  # addresses would else be loop invariants, and spilled
        under_way = [load(pages[slot], piece, rows) for slot, _, piece, rows in STRIPS[:AHEAD]]
        for index, (slot, half, piece, rows) in enumerate(STRIPS):
            if index + AHEAD < len(STRIPS):
                next_slot, _, next_piece, next_rows = STRIPS[index + AHEAD]
                under_way.append(load(pages[next_slot], next_piece, next_rows))
            if piece == 2 * half and rows.start == 0:
                await_empty(s, slot, half, is_first)
            store(under_way.pop(0), slot + zero, piece, rows, num_tokens[slot])
            if rows.start + STRIP == PAGE:
                announce(slot, piece, s)

    return bring_pair


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _across(row_values, num_columns: int, layout):
    return plgpu.layout_cast(lax.broadcast_in_dim(row_values, (STRIP, num_columns), [0]), layout)
