"""Causal attention over documents packed into one row (report section 2.1.1, eq. 10).

Query t sees key s when s <= t and both lie in the same segment, so every row sees at least itself.
Scores and softmax are float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import mla_prefill


def attend(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T H W"]:
    """softmax(scale · q kᵀ) v in linear memory: by a kernel on a Hopper GPU, by chunks of queries in XLA elsewhere.

    J = I + R, the query-key width. `segment_ids` None means one document a row. On a mesh of GPUs call it inside
    `jax.shard_map`: XLA cannot split a kernel.
    """
    return mla_prefill(q, k, v, segment_ids, softmax_scale=scale)[0]


def attend_reference(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T H W"]:
    """`attend` as its equation reads, with the whole [T, T] matrix of scores: what tests compare with."""
    scores_BHTS = jnp.einsum("bthj,bshj->bhts", q, k, preferred_element_type=jnp.float32) * scale
    positions = jnp.arange(q.shape[1])
    visible_BTS = (positions[:, None] >= positions[None, :])[None]
    if segment_ids is not None:
        visible_BTS = visible_BTS & (segment_ids[:, :, None] == segment_ids[:, None, :])
    probabilities = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshw->bthw", probabilities.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype)


attend_blocked = attend
