"""The decoding kernel for Hopper: 64 query rows against one stream of cached keys, in FlashMLA's "seesaw" order.

A thread block has three warpgroups. One brings pages (`pallas_bring`; from the FP8 cache it dequantises them,
`pallas_bring_fp8`); two compute in turns (`pallas_seesaw`). With multicast two thread blocks, which have the same keys
and neighbouring rows, form a cluster: each copies half of a page into the shared memory of both.

Barriers (arrivals by warpgroup; a copy arrives when its bytes have). None can lap its waiter:
- `q_full` (5 copies): the queries of a sequence are there. Awaited by both; the next copies follow `q_free`.
- `q_free` (2): both have written their outputs out of the queries' memory. Awaited by the bringer.
- `full[slot, piece]` (1): pieces 0..3 are 128 columns of the latent, 4 the rotary part. The next follows `empty`.
- `empty[slot, half]` (1): the warpgroup that owns this half of the output has done its last matmul with the page. It
  is then done with the rotary tile too: that of slot 0 goes with the right half, that of slot 1 with the left, for the
  other warpgroup's P is read last. Awaited by the bringer. With multicast the owners in both blocks arrive, one thread
  of each for each block; that suffices, for tensor cores alone read what a copy overwrites, P's tile included.
- `told_m0`, `told_p1`, `told_p0` (1): in this cyclic order, each follows the awaiting of the one before, so none comes
  twice before it was awaited, and `max_s`, `sum_s` and the P tiles are not overwritten before they were read.
- `met` (2): both have left the loop over pages. Awaited by both; the next follows `q_full`, thus `q_free` of both.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32, Shaped, UInt8

from dsv3_kernels import launch
from dsv3_kernels.decode_attention.pallas_bring import bf16_pages, bring
from dsv3_kernels.decode_attention.pallas_bring_fp8 import fp8_pages
from dsv3_kernels.decode_attention.pallas_layout import (
    HALF,
    LATENT,
    MATES,
    PAGE,
    PIECE,
    ROWS,
    Scratch,
    Segment,
    scratch_types,
    segment_of,
)
from dsv3_kernels.decode_attention.pallas_seesaw import across, compute, last_visible

REGISTERS = {False: (216, 72), True: (208, 88)}
"""Of a thread that computes, of one that brings BF16 or (True) FP8; 504 of the 512 that three warpgroups share."""


class Partials(NamedTuple):
    """Results of the kernel: final rows of whole sequences, and two slots a part for pieces of split ones."""

    out: BFloat16[Array, "B R 512"]
    lse: Float32[Array, "B X"]
    part_out: Float32[Array, "Z R 512"]
    part_lse: Float32[Array, "Z X"]


def attend(
    q_latent: BFloat16[Array, "B R 512"],
    q_rope: BFloat16[Array, "B R 64"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    parts: Int32[Array, "G 5"],
    *,
    num_queries: int,
    num_heads: int,
    softmax_scale: float,
    causal: bool,
    multicast: bool,
    interpret: Any = None,
) -> Partials:
    """Attention of R rows a sequence (row s H + h; R is a multiple of 8), in the parts of a plan.

    A sequence that lies in one part gets its rows of `out` and `lse`. Of any other, the part with its first block
    writes slot 2 part + 1, the later ones slot 2 part: rows normalised over the part's keys, and their lse (-inf where
    the part has no visible key). Everything else is left unwritten. A thread block does 64 rows: copies read zeros
    behind row R and drop what they write there; the lses, which are stored from registers, have room for X rows, R
    filled up to a multiple of 64.

    Args:
        seq_lens, parts: of a `Plan`; lengths are cut to what the page table holds, which the plan need not know.
        multicast: whether pairs of row blocks share the copies of BF16 pages; their number must then be even.
    """
    B, R, _ = q_latent.shape
    G, row_blocks = parts.shape[0], -(-R // ROWS)
    max_length = page_table.shape[1] * PAGE
    is_fp8 = kv_pages.dtype == jnp.uint8
    views = _views(kv_pages) if is_fp8 else (kv_pages,)
    num_inputs = 5 + len(views)

    def body(*refs):
        ins, outs, scratch = refs[:num_inputs], refs[num_inputs : num_inputs + 4], refs[num_inputs + 4 :]
        outs, scratch = Partials(*outs), Scratch(*scratch)
        part, row_block, warpgroup = (lax.axis_index(name) for name in ("part", "row_block", "warpgroup"))
        if multicast:
            row_block = 2 * row_block + lax.axis_index(MATES)
        ql, qr, table, lengths, cuts = ins[:5]
        rows = pl.ds(row_block * ROWS, ROWS)

        first_seq, first_block, last_seq, end_block = (cuts[part, column] for column in range(4))
        num_segments = jnp.maximum(last_seq - first_seq + 1, 0)

        def segment(j):
            seq = first_seq + j
            return segment_of(seq, lengths, first_seq, first_block, last_seq, end_block, max_length=max_length)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[is_fp8][1], action="decrease")
            if is_fp8:
                values, scales, rope = ins[5:]
                bring_pair = fp8_pages(values, scales, rope, table, scratch)
            else:
                bring_pair = bf16_pages(ins[5], table, scratch, multicast=multicast)
            bring(ql, qr, scratch, bring_pair, rows=rows, segment=segment, num_segments=num_segments)

        for w in range(2):

            @pl.when(warpgroup == w)
            def _(w=w):
                plgpu.set_max_registers(REGISTERS[is_fp8][0], action="increase")

                @pl.loop(0, num_segments)
                def _(j):
                    seg = segment(j)
                    last = last_visible(seg.length, row_block, num_queries, num_heads, causal=causal)
                    plgpu.barrier_wait(scratch.q_full)
                    state = compute(w, seg, last, scratch, softmax_scale * math.log2(math.e), interpret)
                    _write(w, seg, part, rows, state, outs, scratch)
                    plgpu.barrier_arrive(scratch.q_free)

    slots = 2 * G
    return Partials(
        *launch.kernel(
            body,
            out_type=[
                jax.ShapeDtypeStruct((B, R, LATENT), jnp.bfloat16),
                jax.ShapeDtypeStruct((B, row_blocks * ROWS), jnp.float32),
                jax.ShapeDtypeStruct((slots, R, LATENT), jnp.float32),
                jax.ShapeDtypeStruct((slots, row_blocks * ROWS), jnp.float32),
            ],
            grid=(G, row_blocks // (2 if multicast else 1)),
            grid_names=("part", "row_block"),
            cluster=(2,) if multicast else (),
            cluster_names=(MATES,) if multicast else (),
            num_threads=3,
            thread_name="warpgroup",
            scratch_types=scratch_types(multicast=multicast),
            approx_math=True,
            interpret=interpret,
        )(q_latent, q_rope, page_table, seq_lens, parts, *views)
    )


def _views(kv_pages: UInt8[Array, "N 64 656"]) -> tuple[Array, ...]:
    """The same bytes as E4M3, float32 and BF16; XLA makes no copy of them."""
    shape = kv_pages.shape[:2]
    return (
        lax.bitcast_convert_type(kv_pages, jnp.float8_e4m3fn),
        lax.bitcast_convert_type(kv_pages.reshape(*shape, -1, 4), jnp.float32),
        lax.bitcast_convert_type(kv_pages.reshape(*shape, -1, 2), jnp.bfloat16),
    )


def _write(w: int, seg: Segment, part, rows, state, outs: Any, s: Scratch) -> None:
    """Normalises warpgroup w's half and writes it, through the queries' memory; warpgroup 0 writes the lse."""
    *acc, m, total = state
    s.sums[w] = total
    plgpu.barrier_arrive(s.met)
    plgpu.barrier_wait(s.met)
    total = total + plgpu.load(s.sums.at[1 - w], layout=plgpu.Layout.WGMMA.reduce(1))
    has_keys = total != 0  # a NaN in a key is shown, not hidden
    divisor = jnp.where(has_keys, total, 1.0)
    acc = [a * across(1.0 / divisor, PIECE) for a in acc]
    lse = (m + jnp.log2(divisor)) * math.log(2)

    @pl.when(seg.is_whole)
    def _():
        for j, a in enumerate(acc):
            s.q_latent[2 * w + j] = a.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for j in range(2):
            columns = pl.ds(w * HALF + j * PIECE, PIECE)
            plgpu.copy_smem_to_gmem(s.q_latent.at[2 * w + j], outs.out.at[seg.seq, rows, columns])
        if w == 0:
            outs.lse[seg.seq, rows] = jnp.where(has_keys, lse, jnp.inf)

    @pl.when(jnp.logical_not(seg.is_whole))
    def _():
        slot = 2 * part + (seg.begin == 0).astype(jnp.int32)
        for j, a in enumerate(acc):
            if j:
                plgpu.wait_smem_to_gmem(0)
            s.staging[w] = a
            plgpu.commit_smem()
            columns = pl.ds(w * HALF + j * PIECE, PIECE)
            plgpu.copy_smem_to_gmem(s.staging.at[w], outs.part_out.at[slot, rows, columns])
        if w == 0:
            outs.part_lse[slot, rows] = jnp.where(has_keys, lse, -jnp.inf)

    plgpu.wait_smem_to_gmem(0)
