"""Causal attention over documents packed into one row (report section 2.1.1, eq. 10).

Query t sees key s when s <= t and both lie in the same segment, so every row sees at least itself.
Scores and softmax are float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float, Int

NEGATIVE = -1e30  # finite, so that a masked score never makes inf - inf


def attend_full(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T H W"]:
    """Softmax(scale · q kᵀ) v with the whole [T, T] matrix: the plain twin of `attend_blocked`.

    J = I + R, the query-key width. `segment_ids` None means one document a row.
    """
    scores_BHTS = jnp.einsum("bthj,bshj->bhts", q, k, preferred_element_type=jnp.float32) * scale
    index_T = jnp.arange(q.shape[1])
    allowed_BTS = (index_T[:, None] >= index_T[None, :])[None]
    if segment_ids is not None:
        allowed_BTS = allowed_BTS & (segment_ids[:, :, None] == segment_ids[:, None, :])
    probs_BHTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], scores_BHTS, NEGATIVE), axis=-1)
    out = jnp.einsum("bhts,bshw->bthw", probs_BHTS.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype)


def attend_blocked(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    block_size: int = 128,
) -> Float[Array, "B T H W"]:
    """`attend_full` by blocks of queries, each reading keys up to its own end only."""
    T = q.shape[1]
    outs = []
    for start in range(0, T, block_size):
        end = min(start + block_size, T)
        scores_BHTS = jnp.einsum("bthj,bshj->bhts", q[:, start:end], k[:, :end], preferred_element_type=jnp.float32)
        allowed_BTS = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]
        if segment_ids is not None:
            allowed_BTS = allowed_BTS & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        probs_BHTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], scores_BHTS * scale, NEGATIVE), axis=-1)
        out = jnp.einsum("bhts,bshw->bthw", probs_BHTS.astype(v.dtype), v[:, :end], preferred_element_type=jnp.float32)
        outs.append(out.astype(v.dtype))
    return jnp.concatenate(outs, axis=1)
