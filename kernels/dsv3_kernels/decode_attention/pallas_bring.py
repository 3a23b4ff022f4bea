"""The warpgroup of the decoding kernel that brings queries and pages into shared memory.

A page that a sequence fills only in part, or not at all, is the bringer's business too: slots that hold no token may
hold NaN, and zero times NaN is NaN, so it lets such a page land on `landed` barriers, writes zeros over the rows that
count for nothing, and only then tells `full`. The consumers see finite numbers only, and the pages of a pair are always
both there.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.pallas_layout import LATENT, NUM_PIECES, PAGE, PIECE, ROPE, Scratch

STEPS = ((0, 0, False), (1, 1, False), (1, 0, True), (0, 1, True))
"""(slot, half, with the rotary part?) in the order in which the consumers set them free."""


def bring_pages(ql, qr, kv, table, s: Scratch, *, rows, segment, num_segments) -> None:
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
            last_page = jnp.int32(table.shape[1] - 1)
            pages = [table[seg.seq, jnp.minimum(2 * i + slot, last_page)] for slot in range(2)]
            num_tokens = [jnp.clip(seg.length - (2 * i + slot) * PAGE, 0, PAGE) for slot in range(2)]
            for slot, half, with_rope in STEPS:

                @pl.when(num_pairs > 0)
                def _(slot=slot, half=half):
                    plgpu.barrier_wait(s.empty.at[slot, half])

                pieces = [2 * half, 2 * half + 1] + [NUM_PIECES] * with_rope

                @pl.when(num_tokens[slot] == PAGE)
                def _(slot=slot, pieces=pieces):
                    _copy(kv.at[pages[slot]], slot, pieces, s.full, s)

                @pl.when((num_tokens[slot] > 0) & (num_tokens[slot] < PAGE))
                def _(slot=slot, pieces=pieces):
                    _copy(kv.at[pages[slot]], slot, pieces, s.landed, s)

            for slot in range(2):

                @pl.when((num_tokens[slot] > 0) & (num_tokens[slot] < PAGE))
                def _(slot=slot):
                    _clear_rest(slot, num_tokens[slot], s)

                @pl.when(num_tokens[slot] == 0)
                def _(slot=slot):
                    _clear(slot, s)

            return num_pairs + 1

        return lax.fori_loop(seg.begin, seg.end, one_pair, num_pairs)

    num_pairs = lax.fori_loop(0, num_segments, one_segment, jnp.int32(0))

    # Nothing may arrive at a barrier of a block that has ended.
    @pl.when(num_pairs > 0)
    def _():
        for slot, half, _ in STEPS:
            plgpu.barrier_wait(s.empty.at[slot, half])

    @pl.when(num_segments > 0)
    def _():
        plgpu.barrier_wait(s.q_free)


def _tiles(slot: int, piece: int, s: Scratch):
    """A piece's shared memory in tiles of 64 columns: the registers of this warpgroup are few."""
    if piece == NUM_PIECES:
        return [s.k_rope.at[slot]]
    return [s.kv.at[slot, piece, :, pl.ds(column, 64)] for column in range(0, PIECE, 64)]


def _copy(page, slot: int, pieces, barriers, s: Scratch) -> None:
    for piece in pieces:
        is_rope = piece == NUM_PIECES
        target = s.k_rope.at[slot] if is_rope else s.kv.at[slot, piece]
        columns = pl.ds(LATENT, ROPE) if is_rope else pl.ds(piece * PIECE, PIECE)
        plgpu.copy_gmem_to_smem(page.at[:, columns], target, barriers.at[slot, piece])


def _clear_rest(slot: int, num_tokens, s: Scratch) -> None:
    """Writes zeros over the rows from `num_tokens` on, once they have landed."""
    for piece in range(NUM_PIECES + 1):
        plgpu.barrier_wait(s.landed.at[slot, piece])
        for tile in _tiles(slot, piece, s):
            row = plgpu.broadcasted_iota(jnp.int32, (PAGE, 64), 0, layout=plgpu.Layout.WGMMA)
            tile[...] = jnp.where(row < num_tokens, plgpu.load(tile, layout=plgpu.Layout.WGMMA), jnp.bfloat16(0))
        _announce(slot, piece, s)


def _clear(slot: int, s: Scratch) -> None:
    for piece in range(NUM_PIECES + 1):
        for tile in _tiles(slot, piece, s):
            tile[...] = plgpu.layout_cast(jnp.zeros((PAGE, 64), jnp.bfloat16), plgpu.Layout.WGMMA)
        _announce(slot, piece, s)


def _announce(slot: int, piece: int, s: Scratch) -> None:
    plgpu.commit_smem()  # the tensor cores read what was written here through another proxy
    plgpu.barrier_arrive(s.full.at[slot, piece])
