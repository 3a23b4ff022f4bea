"""From MLA's down-projection to the rows of the latent cache (report eq. 1 and 3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows


def new_rows(
    kv_down: Float[Array, "B T X"],
    norm_scale: Float[Array, "C"],
    cos: Float[Array, "B T halfR"],
    sin: Float[Array, "B T halfR"],
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
    fp8_scale: str,
) -> Shaped[Array, "B T W"]:
    """[RMSNorm(c^KV) | rope(k^R)] in float32, cast to `dtype`; for uint8 packed from the dtype of `kv_down`."""
    C = norm_scale.shape[0]
    latent, rope = kv_down[..., :C].astype(jnp.float32), kv_down[..., C:].astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(latent), axis=-1, keepdims=True) + eps)
    latent = latent * inverse_rms * norm_scale.astype(jnp.float32)[None, None, :]
    even, odd = rope[..., 0::2], rope[..., 1::2]
    rope = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(rope.shape)
    if dtype == jnp.uint8:
        latent, rope = latent.astype(kv_down.dtype), rope.astype(kv_down.dtype)
        return jnp.asarray(pack_fp8_cache_rows(latent, rope, scale=fp8_scale))
    return jnp.concatenate([latent, rope], axis=-1).astype(dtype)


def destinations(
    page_table: Int[Array, "B P"],
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    num_rows: int,
    num_pages: int,
    page_size: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """The page and slot of each new row, and whether it has one: not past its count, table or the pages there are."""
    t = jnp.arange(num_rows, dtype=jnp.int32)[None, :]
    positions = starts.astype(jnp.int32)[:, None] + t
    column = jnp.maximum(positions, 0) // page_size
    pages = jnp.take_along_axis(page_table.astype(jnp.int32), jnp.minimum(column, page_table.shape[1] - 1), axis=1)
    is_written = (t < counts.astype(jnp.int32)[:, None]) & (positions >= 0) & (column < page_table.shape[1])
    return pages, jnp.maximum(positions, 0) % page_size, is_written & (pages >= 0) & (pages < num_pages)
