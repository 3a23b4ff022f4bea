"""The decoding kernel for Hopper: 64 query rows against one stream of cached keys, in FlashMLA's "seesaw" order.

A thread block has three warpgroups. One brings pages (`pallas_bring`; from the FP8 cache it dequantises them,
`pallas_bring_fp8`); two compute, each holding half of the output, 64 rows by 256 columns, in registers. Pages come in
pairs, one in each slot. With S_w = Q K_w^T and V_w = K_w's latent:

    warpgroup 0                                   warpgroup 1
    S_0; m_0 = max(m, rows of S_0)                S_1
    tell m_0; P_0 = exp(S_0 - m_0)                await m_0; m_1 = max(m_0, rows of S_1)
    O_L = O_L e^(m - m_0) + P_0 V_0L              P_1 = exp(S_1 - m_1); tell m_1, P_1
    await m_1, P_1; P_0 *= e^(m_0 - m_1)          O_R = O_R e^(m - m_1) + P_1 V_1R
    tell P_0; O_L = O_L e^(m_0 - m_1) + P_1 V_1L  await P_0; O_R += P_0 V_0R
    m = m_1                                       m = m_1

so that the softmax of one overlaps products of the other. Each keeps its own P in registers for its own product, and
writes it over the rotary tile of its page, which nobody reads once S_w is there, for the other's.

Barriers (arrivals by warpgroup; a copy arrives when its bytes have). None can lap its waiter:
- `q_full` (5 copies): the queries of a sequence are there. Awaited by both; the next copies follow `q_free`.
- `q_free` (2): both have written their outputs out of the queries' memory. Awaited by the bringer.
- `full[slot, piece]` (1): pieces 0..3 are 128 columns of the latent, 4 the rotary part. The next follows `empty`.
- `empty[slot, half]` (1): the warpgroup that owns this half of the output has done its last product with the page. It
  is then done with the rotary tile too: that of slot 0 goes with the right half, that of slot 1 with the left, for the
  other warpgroup's P is read last. Awaited by the bringer.
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

from dsv3_kernels.decode_attention.pallas_bring import bf16_pages, bring
from dsv3_kernels.decode_attention.pallas_bring_fp8 import fp8_pages
from dsv3_kernels.decode_attention.pallas_layout import (
    HALF,
    LATENT,
    NEVER,
    NUM_PIECES,
    PAGE,
    PIECE,
    ROWS,
    Scratch,
    Segment,
    scratch_types,
    segment_of,
)

REGISTERS = {False: (232, 40), True: (208, 88)}
"""Of a thread that computes, of one that brings BF16 or (True) FP8; 504 of the 512 that three warpgroups share."""


class Partials(NamedTuple):
    """Results of the kernel: final rows of whole sequences, and two slots a part for pieces of split ones."""

    out: BFloat16[Array, "B R 512"]
    lse: Float32[Array, "B R"]
    part_out: Float32[Array, "Z R 512"]
    part_lse: Float32[Array, "Z R"]


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
    interpret: Any = None,
) -> Partials:
    """Attention of R rows a sequence (row s H + h, filled up to a multiple of 64), in the parts of a plan.

    A sequence that lies in one part gets its rows of `out` and `lse`. Of any other, the part with its first block
    writes slot 2 part + 1, the later ones slot 2 part: rows normalised over the part's keys, and their lse (-inf where
    the part has no visible key). Everything else is left unwritten.
    """
    B, R, _ = q_latent.shape
    G = parts.shape[0]
    is_fp8 = kv_pages.dtype == jnp.uint8
    views = _views(kv_pages) if is_fp8 else (kv_pages,)
    num_inputs = 5 + len(views)

    def body(*refs):
        ins, outs, scratch = refs[:num_inputs], refs[num_inputs : num_inputs + 4], refs[num_inputs + 4 :]
        outs, scratch = Partials(*outs), Scratch(*scratch)
        part, row_block, warpgroup = (lax.axis_index(name) for name in ("part", "row_block", "warpgroup"))
        ql, qr, table, lengths, cuts = ins[:5]
        rows = pl.ds(row_block * ROWS, ROWS)

        first_seq, first_block, last_seq, end_block = (cuts[part, column] for column in range(4))
        num_segments = jnp.maximum(last_seq - first_seq + 1, 0)

        def segment(j):
            return segment_of(first_seq + j, lengths, first_seq, first_block, last_seq, end_block)

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(REGISTERS[is_fp8][1], action="decrease")
            if is_fp8:
                values, scales, rope = ins[5:]
                bring_pair = fp8_pages(values, scales, rope, table, scratch)
            else:
                bring_pair = bf16_pages(ins[5], table, scratch)
            bring(ql, qr, scratch, bring_pair, rows=rows, segment=segment, num_segments=num_segments)

        for w in range(2):

            @pl.when(warpgroup == w)
            def _(w=w):
                plgpu.set_max_registers(REGISTERS[is_fp8][0], action="increase")

                @pl.loop(0, num_segments)
                def _(j):
                    seg = segment(j)
                    last = _last_visible(seg.length, row_block, num_queries, num_heads, causal=causal)
                    plgpu.barrier_wait(scratch.q_full)
                    state = _compute(w, seg, last, scratch, softmax_scale * math.log2(math.e), interpret)
                    _write(w, seg, part, rows, state, outs, scratch)
                    plgpu.barrier_arrive(scratch.q_free)

    slots = 2 * G
    return Partials(
        *plgpu.kernel(
            body,
            out_type=[
                jax.ShapeDtypeStruct((B, R, LATENT), jnp.bfloat16),
                jax.ShapeDtypeStruct((B, R), jnp.float32),
                jax.ShapeDtypeStruct((slots, R, LATENT), jnp.float32),
                jax.ShapeDtypeStruct((slots, R), jnp.float32),
            ],
            grid=(G, R // ROWS),
            grid_names=("part", "row_block"),
            num_threads=3,
            thread_name="warpgroup",
            scratch_types=scratch_types(),
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
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


def _last_visible(length, row_block, num_queries: int, num_heads: int, *, causal: bool):
    """int32 [64]: the last key position each row sees; rows that fill up the block as the last query."""
    if not causal:
        return plgpu.layout_cast(jnp.full((ROWS,), length - 1, jnp.int32), plgpu.Layout.WGMMA.reduce(1))
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    query = lax.div(row + row_block * ROWS, jnp.int32(num_heads))
    return jnp.minimum(query + (length - num_queries), length - 1)


def _compute(w: int, seg: Segment, last, s: Scratch, scale_log2: float, interpret):
    """Warpgroup w's loop over the page pairs of a segment: its half of the output, row maxima, row sums.

    The output is not yet divided by the sums. Maxima are of scores in units of log2; the sums are over
    this warpgroup's pages alone.
    """
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    quarter = plgpu.layout_cast(jnp.zeros((ROWS, PIECE), jnp.float32), plgpu.Layout.WGMMA)
    start = (
        quarter,
        quarter,
        plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), row_layout),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
    )
    other = 1 - w
    own, foreign = (2 * w, 2 * w + 1), (2 * other, 2 * other + 1)

    def pair(i, carry):
        *acc, m, total = carry
        # Zero, but the compiler cannot know: the descriptors of 44 products would else be loop invariants, computed
        # before the loop and spilled.
        zero = lax.optimization_barrier(jnp.int32(0))

        def scores(acc_ref):
            for piece in (*own, *foreign):
                plgpu.barrier_wait(s.full.at[w, piece])
                plgpu.wgmma(acc_ref, s.q_latent.at[piece + zero], s.kv.at[w + zero, piece].T)
            plgpu.barrier_wait(s.full.at[w, NUM_PIECES])
            plgpu.wgmma(acc_ref, s.q_rope.at[zero], s.k_rope.at[w + zero].T)
            return acc_ref[...]

        score = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, PAGE), jnp.float32))
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 1, layout=plgpu.Layout.WGMMA)
        position = column + (2 * i + w) * PAGE
        score = jnp.where(position <= _across(last, PAGE), score, -jnp.inf)
        if w == 0:
            before = m
        else:
            plgpu.barrier_wait(s.told_m0)
            before = plgpu.load(s.maxima.at[0], layout=row_layout)
        m_new = jnp.maximum(before, score.max(axis=1) * scale_log2)
        p = jnp.exp2(score * scale_log2 - _across(m_new, PAGE))
        alpha = jnp.exp2(m - m_new)
        total = total * alpha + p.sum(axis=1)
        s.maxima[w] = m_new
        if w == 0:
            plgpu.barrier_arrive(s.told_m0)
        else:
            _tell(s.k_rope.at[1], p, s.told_p1)
        acc = [a * _across(alpha, PIECE) for a in acc]
        acc = _add_products(acc, p.astype(jnp.bfloat16), [s.kv.at[w + zero, piece] for piece in own], interpret)
        plgpu.barrier_arrive(s.empty.at[w, w])
        if w == 0:
            plgpu.barrier_wait(s.told_p1)
            m_both = plgpu.load(s.maxima.at[1], layout=row_layout)
            beta = jnp.exp2(m_new - m_both)
            m_new, total = m_both, total * beta
            _tell(s.k_rope.at[0], p * _across(beta, PAGE), s.told_p0)
            acc = [a * _across(beta, PIECE) for a in acc]
        else:
            plgpu.barrier_wait(s.told_p0)
        for piece in own:  # its bytes are there, as the other knows; but a thread sees copies whose barrier it awaited
            plgpu.barrier_wait(s.full.at[other, piece])
        values = [s.kv.at[other + zero, piece] for piece in own]
        acc = _add_products(acc, s.k_rope.at[other + zero], values, interpret)
        plgpu.barrier_arrive(s.empty.at[other, w])
        return *acc, m_new, total

    return lax.fori_loop(seg.begin, seg.end, pair, start)


def _tell(tile, p, barrier) -> None:
    """Writes P for the other warpgroup's products; the fence makes it visible to the tensor cores."""
    tile[...] = p.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def _add_products(acc, a, values, interpret) -> list[Any]:
    """acc_j + a values_j; `a` is an array in registers or a tile in shared memory. Awaits the result."""
    if interpret:  # it has neither accumulators with a start value nor left operands in registers
        a = a[...].astype(jnp.float32)
        acc = [x + jnp.dot(a, value[...].astype(jnp.float32)) for x, value in zip(acc, values)]
        plgpu.commit_smem()  # for its race detector: these are not the tensor core's reads
        return acc

    def body(refs):
        for ref, value in zip(refs, values):
            plgpu.wgmma(ref, a, value)

    return pl.run_state(body)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])


def _write(w: int, seg: Segment, part, rows, state, outs: Any, s: Scratch) -> None:
    """Normalises warpgroup w's half and writes it, through the queries' memory; warpgroup 0 writes the lse."""
    *acc, m, total = state
    s.sums[w] = total
    plgpu.barrier_arrive(s.met)
    plgpu.barrier_wait(s.met)
    total = total + plgpu.load(s.sums.at[1 - w], layout=plgpu.Layout.WGMMA.reduce(1))
    has_keys = total != 0  # a NaN in a key is shown, not hidden
    divisor = jnp.where(has_keys, total, 1.0)
    acc = [a * _across(1.0 / divisor, PIECE) for a in acc]
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


def _across(row_values, num_columns: int):
    return lax.broadcast_in_dim(row_values, (ROWS, num_columns), [0])
