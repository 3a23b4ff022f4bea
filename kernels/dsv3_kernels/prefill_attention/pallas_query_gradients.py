"""dQ on Hopper: 128 queries of a head stay, blocks of keys pass by."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.prefill_attention.pallas_backward import (
    STAGES,
    Copies,
    backward_kernel,
    bring,
    slot_of,
    vector_memory,
)
from dsv3_kernels.prefill_attention.pallas_parts import (
    BY_ROW,
    CONSUMERS,
    LOG2E,
    QK_DIM,
    ROWS,
    TILE,
    add_product,
    over_columns,
    positions,
    product,
    same_ids,
    visit_all,
    zeros,
)


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
    """dQ [B, T, H, 192], bfloat16.

    As `key_gradients`, but `visits` [B, T / TILE, 4] is over blocks of `ROWS` keys; the first `num_keys` keys count.
    """
    B, T, H, _ = q.shape
    has_segments = q_segment_ids is not None
    scale, square, last_key = softmax_scale * LOG2E, (ROWS, ROWS), num_keys - 1

    def body(q_ref, k_ref, v_ref, starts_ref, visits_ref, d_out_ref, lse_ref, delta_ref, *rest):
        ids, rest = rest[: 2 * has_segments], rest[2 * has_segments :]
        dq_ref, q_s, d_out_s, k_s, v_s, lse_s, delta_s, q_ids_s, kv_ids_s, q_full, full, empty = rest
        b, h, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        tile = T // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, full_begin, full_end, end = (visits_ref[b, tile, i] for i in range(4))

        def staying(w: int) -> Copies:
            rows = pl.ds(tile * TILE + w * ROWS, ROWS)
            copies = [
                (q_ref.at[b, rows, h], q_s),
                (d_out_ref.at[b, rows, h], d_out_s),
                (lse_ref.at[b, h, rows], lse_s),
                (delta_ref.at[b, h, rows], delta_s),
            ]
            return [*copies, (ids[0].at[b, rows], q_ids_s)] if has_segments else copies

        def passing(i) -> Copies:
            keys = pl.ds(i * ROWS, ROWS)
            copies = [(k_ref.at[b, keys, h], k_s), (v_ref.at[b, keys, h], v_s)]
            return [*copies, (ids[1].at[b, keys], kv_ids_s)] if has_segments else copies

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            bring(staying, passing, q_full, full, empty, begin, end)

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
                return found & same_ids(q_ids_s.at[wg], kv_ids_s.at[slot]) if has_segments else found

            def visit(is_masked):
                def step(i, dq):
                    slot = slot_of(i, begin)
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

            dq = visit_all(visit, begin, full_begin, full_end, end, zeros(ROWS, QK_DIM))
            q_s[wg] = (dq * softmax_scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[wg], dq_ref.at[b, pl.ds(first_query, ROWS), h])
            plgpu.wait_smem_to_gmem(0)

    ids = (q_segment_ids, kv_segment_ids) if has_segments else ()
    body.__name__ = "mla_prefill_query_gradients"
    return backward_kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(B, H, T // TILE),
        vectors=[
            vector_memory(CONSUMERS, jnp.float32),  # lse
            vector_memory(CONSUMERS, jnp.float32),  # delta
            vector_memory(CONSUMERS, jnp.int32),  # segments of queries
            vector_memory(STAGES, jnp.int32),  # segments of keys
        ],
        num_staying=4 + has_segments,
        num_passing=2 + has_segments,
        interpret=interpret,
    )(q, k, v, q_starts, visits, d_out, lse2, delta, *ids)
