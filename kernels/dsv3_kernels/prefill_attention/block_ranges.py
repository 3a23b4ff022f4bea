"""Which blocks of keys a tile of queries has to visit, and in which of them every query sees every key."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Overlaps(NamedTuple):
    """Of each tile of queries with each block of keys."""

    some: Bool[Array, "B T_blocks S_blocks"]
    """Some query may see some key."""
    every: Bool[Array, "B T_blocks S_blocks"]
    """Every query sees every key, so that no mask is needed."""


def overlaps(
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_starts: Int[Array, "B"],
    *,
    q_tiles: int,
    kv_blocks: int,
    q_tile: int,
    kv_block: int,
    num_keys: int,
) -> Overlaps:
    """T = q_tiles · q_tile and S = kv_blocks · kv_block, of which the first `num_keys` are keys.

    Segments are compared by the smallest and largest id of a block: exact where ids are sorted, safe where not.
    """
    first_query = q_starts[:, None, None] + (jnp.arange(q_tiles, dtype=jnp.int32) * q_tile)[None, :, None]
    first_key = (jnp.arange(kv_blocks, dtype=jnp.int32) * kv_block)[None, None, :]
    last_key = first_key + kv_block - 1
    some = (first_key <= first_query + q_tile - 1) & (first_key < num_keys)
    every = (last_key <= first_query) & (last_key < num_keys)
    if q_segment_ids is None or kv_segment_ids is None:
        return Overlaps(some, every)
    B = q_starts.shape[0]
    q_ids = q_segment_ids.reshape(B, q_tiles, 1, q_tile)
    kv_ids = kv_segment_ids.reshape(B, 1, kv_blocks, kv_block)
    q_low, q_high, kv_low, kv_high = q_ids.min(-1), q_ids.max(-1), kv_ids.min(-1), kv_ids.max(-1)
    some = some & (kv_low <= q_high) & (kv_high >= q_low)
    every = every & (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)
    return Overlaps(some, every)


def visits(some: Bool[Array, "*batch S_blocks"], every: Bool[Array, "*batch S_blocks"]) -> Int[Array, "*batch 4"]:
    """(begin, a, b, end): blocks begin..end are visited, of which a..b need no mask.

    Blocks without overlap between others with overlap are visited too, masked; so are full ones after the first run.
    """
    count = some.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    index = index.reshape((1,) * (some.ndim - 1) + (count,))

    def first(where: Array, otherwise: Array) -> Array:
        return jnp.where(where, index, otherwise).min(axis=-1)

    def full(like: Array, value: int) -> Array:
        return jnp.full_like(like, value)

    whole = jnp.broadcast_to(index, some.shape)
    begin = first(some, full(whole, count))
    end = jnp.where(some, index + 1, 0).max(axis=-1)
    begin = jnp.minimum(begin, end)
    a = jnp.minimum(first(every, full(whole, count)), end)
    b = first(~every & (index >= a[..., None]), full(whole, count))
    return jnp.stack([begin, a, jnp.minimum(b, end), end], axis=-1)
