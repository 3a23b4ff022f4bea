"""dK and dV on Hopper: 128 keys of a head stay, tiles of queries pass by.

Everything is transposed, so that P and dS come out as the left operand of the next matmul.
"""

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
    BY_COLUMN,
    CONSUMERS,
    LOG2E,
    QK_DIM,
    ROWS,
    TILE,
    V_DIM,
    add_product,
    over_rows,
    positions,
    product_from,
    same_ids,
    unhoisted,
    visit_all,
    zeros,
)


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
    has_segments = q_segment_ids is not None
    scale, square = softmax_scale * LOG2E, (ROWS, ROWS)

    def body(q_ref, k_ref, v_ref, q_positions_ref, visits_ref, d_out_ref, lse_ref, delta_ref, *rest):
        ids, rest = rest[: 2 * has_segments], rest[2 * has_segments :]
        dk_ref, dv_ref, k_s, v_s, q_s, d_out_s, lse_s, delta_s, q_positions_s, q_ids_s, kv_ids_s, *barriers = rest
        kv_full, full, empty = barriers
        b, h, wg, tile = (lax.axis_index(name) for name in ("b", "h", "wg", "tile"))
        begin, full_begin, full_end, end = (visits_ref[b, tile, i] for i in range(4))

        def staying(w: int) -> Copies:
            keys = pl.ds(tile * TILE + w * ROWS, ROWS)
            copies = [(k_ref.at[b, keys, h], k_s), (v_ref.at[b, keys, h], v_s)]
            return [*copies, (ids[1].at[b, keys], kv_ids_s)] if has_segments else copies

        def passing(i) -> Copies:
            rows = pl.ds(i * ROWS, ROWS)
            copies = [
                (q_ref.at[b, rows, h], q_s),
                (d_out_ref.at[b, rows, h], d_out_s),
                (lse_ref.at[b, h, rows], lse_s),
                (delta_ref.at[b, h, rows], delta_s),
                (q_positions_ref.at[b, rows], q_positions_s),
            ]
            return [*copies, (ids[0].at[b, rows], q_ids_s)] if has_segments else copies

        @pl.when(wg == CONSUMERS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            bring(staying, passing, kv_full, full, empty, begin, end)

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
                return jnp.where(same_ids(kv_ids_s.at[wg], q_ids_s.at[slot]), p, 0.0) if has_segments else p

            def visit(is_masked):
                def step(i, carry):
                    dk, dv = carry
                    slot, mine = slot_of(i, begin), unhoisted(wg, i)
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
            dk, dv = visit_all(visit, begin, full_begin, full_end, end, carry)
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
    body.__name__ = "mla_prefill_key_gradients"
    return backward_kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(B, H, k.shape[1] // TILE),
        vectors=[
            vector_memory(STAGES, jnp.float32),  # lse
            vector_memory(STAGES, jnp.float32),  # delta
            vector_memory(STAGES, jnp.int32),  # positions of queries
            vector_memory(STAGES, jnp.int32),  # their segments
            vector_memory(CONSUMERS, jnp.int32),  # segments of keys
        ],
        num_staying=2 + has_segments,
        num_passing=5 + has_segments,
        interpret=interpret,
    )(q, k, v, q_positions, visits, d_out, lse2, delta, *ids)
