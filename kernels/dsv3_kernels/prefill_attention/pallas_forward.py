"""The forward pass of prefill attention on Hopper.

A block of threads has 128 queries of one head: two warpgroups of 64 compute, a third loads keys and values through TMA
into a ring. The two take turns: while one exponentiates, the other's matmuls run on the tensor cores. Which blocks of
keys are visited, and which of them need a mask, is data (`block_ranges`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels import launch
from dsv3_kernels.prefill_attention.pallas_parts import (
    BY_ROW,
    CONSUMERS,
    LN2,
    LOG2E,
    QK_DIM,
    ROWS,
    TILE,
    V_DIM,
    add_product,
    matrix_memory,
    over_columns,
    positions,
    product,
    same_ids,
    visit_all,
    zeros,
)

KV_BLOCK = 128
PART = 64
PARTS = QK_DIM // PART
"""Queries lie in parts of 64 columns, so that the output can leave from where they lay."""
STAGES = 2
"""48 KiB of queries and 80 KiB a stage: 208 of 227 KiB."""


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_starts: jax.Array,
    visits: jax.Array,
    *,
    softmax_scale: float,
    num_keys: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, H, 128] bfloat16 and lse [B, H, T] float32.

    T is a multiple of `TILE`, S of `KV_BLOCK`, of which the first `num_keys` count; `visits` [B, T / TILE, 4] is over
    blocks of `KV_BLOCK`.
    """
    B, T, H, _ = q.shape
    has_segments = q_segment_ids is not None
    scale = softmax_scale * LOG2E
    stages, last_key = np.int32(STAGES), num_keys - 1

    def body(q_ref, k_ref, v_ref, starts_ref, visits_ref, *rest):
        ids, rest = rest[: 2 * has_segments], rest[2 * has_segments :]
        out_ref, lse_ref, q_s, k_s, v_s, lse_s, q_ids_s, kv_ids_s, q_full, k_full, v_full, k_empty, v_empty, turn = rest
        b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
        tile = T // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, full_begin, full_end, end = (visits_ref[b, tile, i] for i in range(4))

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            for w in range(CONSUMERS):
                rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                for part in range(PARTS):
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h, _columns(part)], q_s.at[w, part], q_full.at[w])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[0].at[b, rows], q_ids_s.at[w], q_full.at[w])

            @pl.loop(begin, end)
            def _(i):
                slot, keys = lax.rem(i - begin, stages), pl.ds(i * KV_BLOCK, KV_BLOCK)

                @pl.when(i - begin >= stages)
                def _():
                    plgpu.barrier_wait(k_empty.at[slot])

                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, h], k_s.at[slot], k_full.at[slot])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[1].at[b, keys], kv_ids_s.at[slot], k_full.at[slot])

                @pl.when(i - begin >= stages)
                def _():
                    plgpu.barrier_wait(v_empty.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, h], v_s.at[slot], v_full.at[slot])

            @pl.loop(jnp.maximum(begin, end - stages), end)
            def _(i):
                slot = lax.rem(i - begin, stages)
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])

        @pl.when(wg < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            first_query = tile * TILE + wg * ROWS
            first_position = starts_ref[b] + first_query
            plgpu.barrier_wait(q_full.at[wg])

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            @pl.when(begin < end)
            def _():
                plgpu.barrier_wait(k_full.at[0])

            pl.when(wg == 1)(take_turns)

            def masked(scores, i, slot):
                shape = (ROWS, KV_BLOCK)
                rows = positions(shape, 0, first_position, interpret=interpret)
                if num_keys % KV_BLOCK:
                    rows = jnp.minimum(rows, last_key)
                scores = jnp.where(rows >= positions(shape, 1, i * KV_BLOCK, interpret=interpret), scores, -jnp.inf)
                if has_segments:
                    scores = lax.optimization_barrier(scores)  # one mask after the other, or registers run out
                    scores = jnp.where(same_ids(q_ids_s.at[wg], kv_ids_s.at[slot]), scores, -jnp.inf)
                return scores

            def visit(is_masked):
                def step(i, carry):
                    acc, peak, total = carry
                    slot = lax.rem(i - begin, stages)
                    parts = [(q_s.at[wg, part], k_s.at[slot, :, _columns(part)].T) for part in range(PARTS)]
                    scores = product(parts, (ROWS, KV_BLOCK), take_turns)
                    if is_masked:
                        scores = masked(scores, i, slot)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
                    # A row that has seen no key yet has no peak to measure from.
                    origin = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if is_masked else new_peak
                    shrink = jnp.exp2(peak - origin)
                    p = jnp.exp2(scores * scale - over_columns(origin, KV_BLOCK))
                    total = total * shrink + p.sum(axis=1)
                    acc = acc * over_columns(shrink, V_DIM)
                    p = p.astype(jnp.bfloat16)
                    acc, total, new_peak, p = lax.optimization_barrier((acc, total, new_peak, p))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)

                    def wait_for_next_keys():
                        @pl.when(i + 1 < end)
                        def _():
                            plgpu.barrier_wait(k_full.at[lax.rem(i + 1 - begin, stages)])

                    acc = add_product(acc, p, v_s.at[slot], wait_for_next_keys, interpret=interpret)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return acc, new_peak, total

                return step

            peak = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), BY_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
            carry = (zeros(ROWS, V_DIM), peak, total)
            acc, peak, total = visit_all(visit, begin, full_begin, full_end, end, carry)
            pl.when(wg == 0)(take_turns)

            sees_any = total > 0.0
            divisor = jnp.where(sees_any, total, 1.0)
            lse_s[wg] = jnp.where(sees_any, peak * LN2 + jnp.log(divisor), jnp.inf)
            out = (acc * over_columns(1.0 / divisor, V_DIM)).astype(jnp.bfloat16)
            rows = pl.ds(first_query, ROWS)
            # The output takes the place of the queries: only this warpgroup read them, and it is done.
            for part in range(V_DIM // PART):
                q_s[wg, part] = out[:, part * PART : (part + 1) * PART]
            plgpu.commit_smem()
            for part in range(V_DIM // PART):
                plgpu.copy_smem_to_gmem(q_s.at[wg, part], out_ref.at[b, rows, h, _columns(part)])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

    ids = (q_segment_ids, kv_segment_ids) if has_segments else ()
    body.__name__ = "mla_prefill"
    return launch.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((B, T, H, V_DIM), q.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)),
        grid=(B, H, T // TILE),
        grid_names=("b", "h", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=[
            matrix_memory(CONSUMERS, PARTS, ROWS, PART),
            matrix_memory(STAGES, KV_BLOCK, QK_DIM),
            matrix_memory(STAGES, KV_BLOCK, V_DIM),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.int32),
            plgpu.SMEM((STAGES, KV_BLOCK), jnp.int32),
            plgpu.Barrier(num_arrivals=PARTS + has_segments, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=1 + has_segments, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS),
        ],
        approx_math=True,
        interpret=interpret,
    )(q, k, v, q_starts, visits, *ids)


def _columns(part: int) -> Any:
    return pl.ds(part * PART, PART)
