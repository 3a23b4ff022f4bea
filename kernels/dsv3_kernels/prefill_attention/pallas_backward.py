"""The backward pass of prefill attention on Hopper: one kernel for dK and dV, one for dQ.

Both make the probabilities again from lse: P = exp(scale · q kᵀ - lse), dS = P · (dO vᵀ - delta). The first has 128
keys of a head and visits tiles of queries, with everything transposed so that P and dS come out as the left operand of
the next product; the second has 128 queries and visits blocks of keys. No atomics, so gradients are the same each time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.prefill_attention.pallas_parts import (
    BY_COLUMN,
    BY_ROW,
    CONSUMERS,
    LANE,
    LOG2E,
    QK_DIM,
    ROWS,
    TILE,
    V_DIM,
    add_product,
    matrix_memory,
    over_columns,
    over_rows,
    positions,
    product,
    product_from,
    unhoisted,
    zeros,
)

STAGES = 3
"""80 KiB of rows that stay, and 40 KiB a stage of rows that pass by: 200 of 227 KiB."""


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_starts: jax.Array,
    visits: jax.Array,
    d_out: jax.Array,
    lse2: jax.Array,
    delta: jax.Array,
    *,
    softmax_scale: float,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """dK [B, S, H, 192] and dV [B, S, H, 128], bfloat16.

    T and S are multiples of `TILE`; `lse2` is log2(e) · lse and `delta` out·dout - dlse, [B, H, T]; `visits`
    [B, S / TILE, 4] is over tiles of `ROWS` queries. Keys that no query counts get zeros.
    """
    B, _, H, _ = q.shape
    S = k.shape[1]
    has_segments = q_segment_ids is not None
    scale, stages = softmax_scale * LOG2E, np.int32(STAGES)
    square = (ROWS, ROWS)

    def body(q_ref, k_ref, v_ref, q_positions_ref, visits_ref, d_out_ref, lse_ref, delta_ref, *rest):
        ids, rest = rest[: 2 * has_segments], rest[2 * has_segments :]
        (
            dk_ref,
            dv_ref,
            k_s,
            v_s,
            q_s,
            d_out_s,
            lse_s,
            delta_s,
            q_positions_s,
            q_ids_s,
            kv_ids_s,
            kv_full,
            full,
            empty,
        ) = rest
        b, h, wg, tile = (lax.axis_index(name) for name in ("b", "h", "wg", "tile"))
        begin, full_begin, full_end, end = (visits_ref[b, tile, i] for i in range(4))

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            for w in range(CONSUMERS):
                keys = pl.ds(tile * TILE + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, h], k_s.at[w], kv_full.at[w])
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, h], v_s.at[w], kv_full.at[w])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[1].at[b, keys], kv_ids_s.at[w], kv_full.at[w])

            @pl.loop(begin, end)
            def _(i):
                slot, rows = lax.rem(i - begin, stages), pl.ds(i * ROWS, ROWS)

                @pl.when(i - begin >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(d_out_ref.at[b, rows, h], d_out_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(q_positions_ref.at[b, rows], q_positions_s.at[slot], full.at[slot])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[0].at[b, rows], q_ids_s.at[slot], full.at[slot])

            _drain(empty, begin, end, stages)

        @pl.when(wg < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            first_key = tile * TILE + wg * ROWS
            plgpu.barrier_wait(kv_full.at[wg])

            def masked(p, slot):
                # Positions of queries are loaded, not counted: a counter for each column would stay in a register.
                keys = positions(square, 0, first_key, interpret=interpret)
                queries = over_rows(plgpu.load(q_positions_s.at[slot], layout=BY_COLUMN), ROWS)
                p = jnp.where(queries >= keys, p, 0.0)
                if has_segments:
                    kv_ids = over_columns(plgpu.load(kv_ids_s.at[wg], layout=BY_ROW), ROWS)
                    q_ids = over_rows(plgpu.load(q_ids_s.at[slot], layout=BY_COLUMN), ROWS)
                    p = jnp.where(q_ids == kv_ids, p, 0.0)
                return p

            def visit(is_masked):
                def step(i, carry):
                    dk, dv = carry
                    slot, mine = lax.rem(i - begin, stages), unhoisted(wg, i)
                    plgpu.barrier_wait(full.at[slot])
                    # Starting at -lse and at -delta costs no registers beside the sums.
                    lse = plgpu.load(lse_s.at[slot], layout=BY_COLUMN)
                    start = over_rows(lse * (-1.0 / scale), ROWS)
                    scores = product_from(start, k_s.at[mine], q_s.at[slot].T, interpret=interpret)
                    p = jnp.exp2(scores * scale)
                    if is_masked:
                        p = masked(p, slot)
                    p = p.astype(jnp.bfloat16)
                    dv = add_product(dv, p, d_out_s.at[slot], interpret=interpret)
                    delta = plgpu.load(delta_s.at[slot], layout=BY_COLUMN)
                    start = over_rows(-delta, ROWS)
                    d_p = product_from(start, v_s.at[mine], d_out_s.at[slot].T, interpret=interpret)
                    d_s = (p.astype(jnp.float32) * d_p).astype(jnp.bfloat16)
                    dk = add_product(dk, d_s, q_s.at[slot], interpret=interpret)
                    plgpu.barrier_arrive(empty.at[slot])
                    return dk, dv

                return step

            carry = (zeros(ROWS, QK_DIM), zeros(ROWS, V_DIM))
            carry = lax.fori_loop(begin, full_begin, visit(True), carry)
            carry = lax.fori_loop(full_begin, full_end, visit(False), carry)
            dk, dv = lax.fori_loop(full_end, end, visit(True), carry)
            # Only this warpgroup read these keys and values, and it is done.
            k_s[wg] = (dk * softmax_scale).astype(jnp.bfloat16)
            v_s[wg] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            keys = pl.ds(first_key, ROWS)
            plgpu.copy_smem_to_gmem(k_s.at[wg], dk_ref.at[b, keys, h])
            plgpu.copy_smem_to_gmem(v_s.at[wg], dv_ref.at[b, keys, h])
            plgpu.wait_smem_to_gmem(0)

    q_positions = q_starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    ids = (q_segment_ids, kv_segment_ids) if has_segments else ()
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(B, H, S // TILE),
        grid_names=("b", "h", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=[
            matrix_memory(CONSUMERS, ROWS, QK_DIM),
            matrix_memory(CONSUMERS, ROWS, V_DIM),
            matrix_memory(STAGES, ROWS, QK_DIM),
            matrix_memory(STAGES, ROWS, V_DIM),
            plgpu.SMEM((STAGES, ROWS), jnp.float32),
            plgpu.SMEM((STAGES, ROWS), jnp.float32),
            plgpu.SMEM((STAGES, ROWS), jnp.int32),
            plgpu.SMEM((STAGES, ROWS), jnp.int32),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=2 + has_segments, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=5 + has_segments, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE),
        interpret=interpret,
    )(q, k, v, q_positions, visits, d_out, lse2, delta, *ids)


def query_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_starts: jax.Array,
    visits: jax.Array,
    d_out: jax.Array,
    lse2: jax.Array,
    delta: jax.Array,
    *,
    softmax_scale: float,
    num_keys: int,
    interpret: Any = None,
) -> jax.Array:
    """dQ [B, T, H, 192], bfloat16. As `key_gradients`; `visits` [B, T / TILE, 4] is over blocks of `ROWS` keys."""
    B, T, H, _ = q.shape
    has_segments = q_segment_ids is not None
    scale, stages, last_key = softmax_scale * LOG2E, np.int32(STAGES), num_keys - 1
    square = (ROWS, ROWS)

    def body(q_ref, k_ref, v_ref, starts_ref, visits_ref, d_out_ref, lse_ref, delta_ref, *rest):
        ids, rest = rest[: 2 * has_segments], rest[2 * has_segments :]
        dq_ref, q_s, d_out_s, k_s, v_s, lse_s, delta_s, q_ids_s, kv_ids_s, q_full, full, empty = rest
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        tile = T // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, full_begin, full_end, end = (visits_ref[b, tile, i] for i in range(4))

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            for w in range(CONSUMERS):
                rows = pl.ds(tile * TILE + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, h], q_s.at[w], q_full.at[w])
                plgpu.copy_gmem_to_smem(d_out_ref.at[b, rows, h], d_out_s.at[w], q_full.at[w])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, h, rows], lse_s.at[w], q_full.at[w])
                plgpu.copy_gmem_to_smem(delta_ref.at[b, h, rows], delta_s.at[w], q_full.at[w])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[0].at[b, rows], q_ids_s.at[w], q_full.at[w])

            @pl.loop(begin, end)
            def _(i):
                slot, keys = lax.rem(i - begin, stages), pl.ds(i * ROWS, ROWS)

                @pl.when(i - begin >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, h], k_s.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, h], v_s.at[slot], full.at[slot])
                if has_segments:
                    plgpu.copy_gmem_to_smem(ids[1].at[b, keys], kv_ids_s.at[slot], full.at[slot])

            _drain(empty, begin, end, stages)

        @pl.when(wg < CONSUMERS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            first_query = tile * TILE + wg * ROWS
            first_position = starts_ref[b] + first_query
            plgpu.barrier_wait(q_full.at[wg])
            lse = plgpu.load(lse_s.at[wg], layout=BY_ROW)
            delta = plgpu.load(delta_s.at[wg], layout=BY_ROW)

            def seen(i, slot):
                rows = positions(square, 0, first_position, interpret=interpret)
                if num_keys % ROWS:
                    rows = jnp.minimum(rows, last_key)
                found = rows >= positions(square, 1, i * ROWS, interpret=interpret)
                if has_segments:
                    q_ids = over_columns(plgpu.load(q_ids_s.at[wg], layout=BY_ROW), ROWS)
                    kv_ids = over_rows(plgpu.load(kv_ids_s.at[slot], layout=BY_COLUMN), ROWS)
                    found = found & (q_ids == kv_ids)
                return found

            def visit(is_masked):
                def step(i, dq):
                    slot = lax.rem(i - begin, stages)
                    plgpu.barrier_wait(full.at[slot])
                    scores = product([(q_s.at[wg], k_s.at[slot].T)], square)
                    d_p = product([(d_out_s.at[wg], v_s.at[slot].T)], square)
                    p = jnp.exp2(scores * scale - over_columns(lse, ROWS))
                    if is_masked:
                        p = jnp.where(seen(i, slot), p, 0.0)
                    d_s = (p * (d_p - over_columns(delta, ROWS))).astype(jnp.bfloat16)
                    dq = add_product(dq, d_s, k_s.at[slot], interpret=interpret)
                    plgpu.barrier_arrive(empty.at[slot])
                    return dq

                return step

            dq = lax.fori_loop(begin, full_begin, visit(True), zeros(ROWS, QK_DIM))
            dq = lax.fori_loop(full_begin, full_end, visit(False), dq)
            dq = lax.fori_loop(full_end, end, visit(True), dq)
            q_s[wg] = (dq * softmax_scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq_ref.at[b, pl.ds(first_query, ROWS), h])
            plgpu.wait_smem_to_gmem(0)

    ids = (q_segment_ids, kv_segment_ids) if has_segments else ()
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(B, H, T // TILE),
        grid_names=("b", "h", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=[
            matrix_memory(CONSUMERS, ROWS, QK_DIM),
            matrix_memory(CONSUMERS, ROWS, V_DIM),
            matrix_memory(STAGES, ROWS, QK_DIM),
            matrix_memory(STAGES, ROWS, V_DIM),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            plgpu.SMEM((CONSUMERS, ROWS), jnp.int32),
            plgpu.SMEM((STAGES, ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=4 + has_segments, num_barriers=CONSUMERS),
            plgpu.Barrier(num_arrivals=2 + has_segments, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=LANE),
        interpret=interpret,
    )(q, k, v, q_starts, visits, d_out, lse2, delta, *ids)


def _drain(empty: Any, begin: jax.Array, end: jax.Array, stages: np.int32) -> None:
    """Sees every slot released, so that no barrier is left half way when the loader ends."""

    @pl.loop(jnp.maximum(begin, end - stages), end)
    def _(i):
        plgpu.barrier_wait(empty.at[lax.rem(i - begin, stages)])
