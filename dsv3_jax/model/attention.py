"""Causal attention over documents packed into one row (report section 2.1.1, eq. 10).

Query t sees key s when s <= t and both lie in the same segment, so every row sees at least itself.
Scores and softmax are float32 whatever the inputs are.
"""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import mla_prefill

MASKED = -1e30
"""Finite, so that masked scores never meet as inf - inf."""

KEPT_ROW = 1024
"""Up to this many positions the backward pass keeps the probabilities, beyond it makes them again."""


def attend_full(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
) -> Float[Array, "B T H W"]:
    """softmax(scale · q kᵀ) v with the whole [T, T] matrix: the plain twin of `attend_blocked`.

    J = I + R, the query-key width. `segment_ids` None means one document a row.
    """
    return _attend(q, k, v, segment_ids, segment_ids, scale=scale, start=0)


def attend_blocked(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    block_size: int | None = None,
) -> Float[Array, "B T H W"]:
    """`attend_full` by blocks of queries, each reading keys up to its own end only: half of the operations.

    `block_size` defaults to an eighth of the row, at least 128. Scores of one block exist at a time; rows longer
    than `KEPT_ROW` are attended again in the backward pass, so that nothing quadratic is kept.
    """
    T = q.shape[1]
    block_size = block_size or max(128, -(-T // 8))
    outs = []
    for start in range(0, T, block_size):
        end = min(start + block_size, T)
        block = functools.partial(_attend, scale=scale, start=start)
        if T > KEPT_ROW:
            block = jax.checkpoint(block)
        query_ids, key_ids = (None, None) if segment_ids is None else (segment_ids[:, start:end], segment_ids[:, :end])
        outs.append(block(q[:, start:end], k[:, :end], v[:, :end], query_ids, key_ids))
    return jnp.concatenate(outs, axis=1)


def attend_flash(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T H J"],
    v: Float[Array, "B T H W"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B T H W"]:
    """`attend_full` by `dsv3_kernels.mla_prefill`: the Hopper kernel where it can run, else its XLA twin.

    Keeps lse, a number a query and head, in place of probabilities. On a mesh call it inside `jax.shard_map`: XLA
    cannot split a kernel.
    """
    return mla_prefill(q, k, v, segment_ids, softmax_scale=scale, implementation=implementation)[0]


def _attend(
    q: Float[Array, "B t H J"],
    k: Float[Array, "B S H J"],
    v: Float[Array, "B S H W"],
    query_ids: Int[Array, "B t"] | None,
    key_ids: Int[Array, "B S"] | None,
    *,
    scale: float,
    start: int,
) -> Float[Array, "B t H W"]:
    """Queries at positions start, start + 1, … over keys at 0, 1, …"""
    scores_BHtS = jnp.einsum("bthj,bshj->bhts", q, k, preferred_element_type=jnp.float32) * scale
    seen_BtS = ((start + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(k.shape[1])[None, :])[None]
    if query_ids is not None and key_ids is not None:
        seen_BtS = seen_BtS & (query_ids[:, :, None] == key_ids[:, None, :])
    probabilities = jax.nn.softmax(jnp.where(seen_BtS[:, None], scores_BHtS, MASKED), axis=-1)
    return jnp.einsum("bhts,bshw->bthw", probabilities.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(
        v.dtype
    )
