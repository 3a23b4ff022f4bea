"""The attention core: causal, over documents packed into one row (report section 2.1.1, eq. 10).

Scores and softmax are float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import mla_prefill
from dsv3_kernels.prefill_attention.visibility import query_positions, seen_keys


def attend(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B S _ J"],
    v: Float[Array, "B S _ W"],
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    *,
    scale: float,
    q_starts: Int[Array, "B"] | None = None,
) -> Float[Array, "B T H W"]:
    """softmax(scale · q kᵀ) v, where query t sees the keys up to its own position within its own segment.

    Query t stands beside key q_starts + t, by default beside key S - T + t. `kv_segment_ids` default to those of the
    queries; None means one document a row. Keys and values may have one head for all H: so decoding attends to
    latents. On a Hopper GPU `dsv3_kernels.mla_prefill` is a kernel; only lse is saved for the backward pass.
    """
    if k.shape[2] == 1:
        return attend_reference(q, k, v, q_segment_ids, kv_segment_ids, scale=scale, q_starts=q_starts)
    return mla_prefill(q, k, v, q_segment_ids, kv_segment_ids, softmax_scale=scale, q_starts=q_starts)[0]


def attend_reference(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B S _ J"],
    v: Float[Array, "B S _ W"],
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    *,
    scale: float,
    q_starts: Int[Array, "B"] | None = None,
) -> Float[Array, "B T H W"]:
    """The plain twin of `attend`, with the whole [T, S] matrix: what to copy for another attention core.

    Rows that no query sees can hold anything, NaN too.
    """
    T, S, kv_ids = q.shape[1], k.shape[1], q_segment_ids if kv_segment_ids is None else kv_segment_ids
    positions = query_positions(q_starts, T, default_start=S - T)
    visible_BTS = seen_keys(positions, jnp.arange(S, dtype=jnp.int32), q_segment_ids, kv_ids)
    v = jnp.where(visible_BTS.any(axis=1)[:, :, None, None], v, 0)  # because 0·NaN is NaN
    h, k, v = ("h", k, v) if k.shape[2] == q.shape[2] else ("", k[:, :, 0], v[:, :, 0])
    scores_BHTS = jnp.einsum(f"bthj,bs{h}j->bhts", q, k, preferred_element_type=jnp.float32) * scale
    probabilities = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BHTS, -1e30), axis=-1)
    return jnp.einsum(f"bhts,bs{h}w->bthw", probabilities.astype(v.dtype), v)
