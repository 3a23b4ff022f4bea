"""The seesaw of the decoding kernel: how two warpgroups share the matmuls and the softmax of a pair of pages.

Each holds half of the output, 64 rows by 256 columns, in registers. Pages come in pairs, one in each slot. With
S_w = Q K_w^T and V_w = K_w's latent:

    warpgroup 0                                   warpgroup 1
    S_0; m_0 = max(m, rows of S_0)                S_1
    tell m_0; P_0 = exp(S_0 - m_0)                await m_0; m_1 = max(m_0, rows of S_1)
    O_L = O_L e^(m - m_0) + P_0 V_0L              P_1 = exp(S_1 - m_1); tell m_1, P_1
    await m_1, P_1; P_0 *= e^(m_0 - m_1)          O_R = O_R e^(m - m_1) + P_1 V_1R
    tell P_0; O_L = O_L e^(m_0 - m_1) + P_1 V_1L  await P_0; O_R += P_0 V_0R
    m = m_1                                       m = m_1

so that the softmax of one overlaps matmuls of the other. Each has its own P in registers for its own matmul, and
writes it over the rotary tile of its page, which nobody reads once S_w is there, for the other's.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.decode_attention.pallas_layout import NEVER, NUM_PIECES, PAGE, PIECE, ROWS, Scratch, Segment


def last_visible(length, row_block, num_queries: int, num_heads: int, *, causal: bool):
    """int32 [64]: the last key position each row sees; rows that fill up the block as the last query."""
    if not causal:
        return plgpu.layout_cast(jnp.full((ROWS,), length - 1, jnp.int32), plgpu.Layout.WGMMA.reduce(1))
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    query = lax.div(row + row_block * ROWS, jnp.int32(num_heads))
    return jnp.minimum(query + (length - num_queries), length - 1)


def compute(w: int, seg: Segment, last, s: Scratch, scale_log2: float, interpret):
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
        # Zero, but the compiler cannot know: the descriptors of 44 matmuls would else be loop invariants, computed
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
        score = jnp.where(position <= across(last, PAGE), score, -jnp.inf)
        if w == 0:
            before = m
        else:
            plgpu.barrier_wait(s.told_m0)
            before = plgpu.load(s.maxima.at[0], layout=row_layout)
        m_new = jnp.maximum(before, score.max(axis=1) * scale_log2)
        p = jnp.exp2(score * scale_log2 - across(m_new, PAGE))
        alpha = jnp.exp2(m - m_new)
        total = total * alpha + p.sum(axis=1)
        s.maxima[w] = m_new
        if w == 0:
            plgpu.barrier_arrive(s.told_m0)
        else:
            _tell(s.k_rope.at[1], p, s.told_p1)
        acc = [a * across(alpha, PIECE) for a in acc]
        acc = _add_products(acc, p.astype(jnp.bfloat16), [s.kv.at[w + zero, piece] for piece in own], interpret)
        plgpu.barrier_arrive(s.empty.at[w, w])
        if w == 0:
            plgpu.barrier_wait(s.told_p1)
            m_both = plgpu.load(s.maxima.at[1], layout=row_layout)
            beta = jnp.exp2(m_new - m_both)
            m_new, total = m_both, total * beta
            _tell(s.k_rope.at[0], p * across(beta, PAGE), s.told_p0)
            acc = [a * across(beta, PIECE) for a in acc]
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
    """Writes P for the other warpgroup's matmuls; the fence makes it visible to the tensor cores."""
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


def across(row_values, num_columns: int):
    """A value of each row, in all columns."""
    return lax.broadcast_in_dim(row_values, (ROWS, num_columns), [0])
