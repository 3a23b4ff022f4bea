"""Which keys a query sees."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def seen_keys(
    q_positions: Int[Array, "_ T"],
    kv_positions: Int[Array, "S"],
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "_ T S"]:
    """True where a key is not behind the query and in its segment; one row where all sequences agree."""
    seen = kv_positions[None, None, :] <= q_positions[:, :, None]
    if q_segment_ids is None or kv_segment_ids is None:
        return seen
    return seen & (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])


def query_positions(
    q_starts: Int[Array, "B"] | None, num_queries: int, *, default_start: int, first: int | Int[Array, ""] = 0
) -> Int[Array, "_ T"]:
    """The key beside each of `num_queries` queries, from query `first` on."""
    starts = jnp.full(1, default_start, jnp.int32) if q_starts is None else q_starts.astype(jnp.int32)
    return starts[:, None] + (jnp.arange(num_queries, dtype=jnp.int32) + jnp.asarray(first, jnp.int32))[None, :]
