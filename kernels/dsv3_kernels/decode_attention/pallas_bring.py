"""The warpgroup of the decoding kernel that brings queries and pages into shared memory.

A page that a sequence fills only in part, or not at all, is the bringer's business too: slots that hold no token may
hold NaN, and zero times NaN is NaN, so it lets such a page land on `landed` barriers, writes zeros over the rows that
count for nothing, and only then tells `full`. The consumers see finite values only, and the pages of a pair are always
both there.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.pallas_layout import LATENT, MATES, NUM_PIECES, PAGE, PIECE, ROPE, Scratch, Segment

STEPS = ((0, 0), (1, 1), (1, 0), (0, 1))
"""(slot, half) in the order in which the consumers set them free."""

BringPair = Callable[[Segment, Any, Any], None]
"""(segment, pair, is it the first of all?) -> None: brings the two pages of a pair."""


def bring(ql, qr, s: Scratch, bring_pair: BringPair, *, rows, segment, num_segments) -> None:
    """Runs through all segments of the part, as the consumers do."""

    def one_segment(j, num_pairs):
        seg = segment(j)

        @pl.when(j > 0)
        def _():
            plgpu.barrier_wait(s.q_free)

        for piece in range(NUM_PIECES):
            columns = pl.ds(piece * PIECE, PIECE)
            plgpu.copy_gmem_to_smem(ql.at[seg.seq, rows, columns], s.q_latent.at[piece], s.q_full)
        plgpu.copy_gmem_to_smem(qr.at[seg.seq, rows], s.q_rope.at[0], s.q_full)

        def one_pair(i, num_pairs):
            bring_pair(seg, i, num_pairs == 0)
            return num_pairs + 1

        return lax.fori_loop(seg.begin, seg.end, one_pair, num_pairs)

    num_pairs = lax.fori_loop(0, num_segments, one_segment, jnp.int32(0))

    # Nothing may arrive at a barrier of a block that has ended.
    @pl.when(num_pairs > 0)
    def _():
        for slot, half in STEPS:
            plgpu.barrier_wait(s.empty.at[slot, half])

    @pl.when(num_segments > 0)
    def _():
        plgpu.barrier_wait(s.q_free)


def bf16_pages(kv, table, s: Scratch, *, multicast: bool) -> BringPair:
    """Pages of [64, 576] BF16: a whole one is copied as it is; with multicast, half by each block for both.

    Bytes of the other block may come before this block's own copy has arrived at the same phase of `full` or `landed`:
    the phase cannot end before that, and has begun, for the other block has waited for `empty` of both.
    """
    axes = MATES if multicast else None

    def bring_pair(seg: Segment, i, is_first) -> None:
        pages = pages_of(table, kv.shape[0], seg, i)
        num_tokens = tokens_of(seg, i)
        for slot, half in STEPS:
            await_empty(s, slot, half, is_first)
            pieces = [2 * half, 2 * half + 1] + [NUM_PIECES] * has_rope(slot, half)

            @pl.when(num_tokens[slot] == PAGE)
            def _(slot=slot, pieces=pieces):
                _copy(kv.at[pages[slot]], slot, pieces, s.full, s, axes)

            @pl.when((num_tokens[slot] > 0) & (num_tokens[slot] < PAGE))
            def _(slot=slot, pieces=pieces):
                _copy(kv.at[pages[slot]], slot, pieces, s.landed, s, axes)

        for slot in range(2):

            @pl.when((num_tokens[slot] > 0) & (num_tokens[slot] < PAGE))
            def _(slot=slot):
                for piece in range(NUM_PIECES + 1):
                    clear_rest(slot, piece, num_tokens[slot], s)

            @pl.when(num_tokens[slot] == 0)
            def _(slot=slot):
                for piece in range(NUM_PIECES + 1):
                    clear(slot, piece, s)

    return bring_pair


def pages_of(table, num_pages: int, seg: Segment, i) -> list[Any]:
    """The page ids of pair i, cut to pages that exist, as XLA's are; past a sequence's end they may be anything."""
    last = jnp.int32(table.shape[1] - 1)
    return [jnp.clip(table[seg.seq, jnp.minimum(2 * i + slot, last)], 0, num_pages - 1) for slot in range(2)]


def tokens_of(seg: Segment, i) -> list[Any]:
    """How many tokens the pages of pair i hold, 0 to 64 each."""
    return [jnp.clip(seg.length - (2 * i + slot) * PAGE, 0, PAGE) for slot in range(2)]


def has_rope(slot: int, half: int) -> bool:
    """Whether the rotary part, which the other warpgroup's P lies over, goes with this half."""
    return slot != half


def await_empty(s: Scratch, slot: int, half: int, is_first) -> None:
    """Waits until the consumers are done with what was there; for the very first pair nothing was."""

    @pl.when(jnp.logical_not(is_first))
    def _():
        plgpu.barrier_wait(s.empty.at[slot, half])


def _copy(page, slot: int, pieces, barriers, s: Scratch, axes: str | None) -> None:
    for piece in pieces:
        is_rope = piece == NUM_PIECES
        target = s.k_rope.at[slot] if is_rope else s.kv.at[slot, piece]
        columns = pl.ds(LATENT, ROPE) if is_rope else pl.ds(piece * PIECE, PIECE)
        plgpu.copy_gmem_to_smem(page.at[:, columns], target, barriers.at[slot, piece], collective_axes=axes)


def clear_rest(slot: int, piece: int, num_tokens, s: Scratch) -> None:
    """Writes zeros over the rows of a piece from `num_tokens` on, once it has landed, and tells the consumers."""
    plgpu.barrier_wait(s.landed.at[slot, piece])
    for tile in _tiles(slot, piece, s):
        row = plgpu.broadcasted_iota(jnp.int32, (PAGE, 64), 0, layout=plgpu.Layout.WGMMA)
        tile[...] = jnp.where(row < num_tokens, plgpu.load(tile, layout=plgpu.Layout.WGMMA), jnp.bfloat16(0))
    announce(slot, piece, s)


def clear(slot: int, piece: int, s: Scratch) -> None:
    """Writes zeros over a piece, and tells the consumers."""
    for tile in _tiles(slot, piece, s):
        tile[...] = plgpu.layout_cast(jnp.zeros((PAGE, 64), jnp.bfloat16), plgpu.Layout.WGMMA)
    announce(slot, piece, s)


def announce(slot: int, piece: int, s: Scratch) -> None:
    """Tells the consumers of what this warpgroup wrote itself."""
    plgpu.commit_smem()  # the tensor cores read what was written here through another proxy
    plgpu.barrier_arrive(s.full.at[slot, piece])


def _tiles(slot: int, piece: int, s: Scratch) -> list[Any]:
    """A piece's shared memory in tiles of 64 columns: the registers of this warpgroup are few."""
    if piece == NUM_PIECES:
        return [s.k_rope.at[slot]]
    return [s.kv.at[slot, piece, :, pl.ds(column, 64)] for column in range(0, PIECE, 64)]
