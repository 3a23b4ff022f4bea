"""The latent cache on any backend: one scatter writes it, one gather reads it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows
from dsv3_kernels.latent_cache.rows import destinations, new_rows


def write(
    kv_pages: Shaped[Array, "N Z W"],
    kv_down: Float[Array, "B T X"],
    norm_scale: Float[Array, "C"],
    cos: Float[Array, "B T R_half"],
    sin: Float[Array, "B T R_half"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    eps: float,
    fp8_scale: str,
) -> Shaped[Array, "N Z W"]:
    """`cache_write`; in place where the caller's jit donates or carries `kv_pages`."""
    N, page_size, _ = kv_pages.shape
    rows = new_rows(kv_down, norm_scale, cos, sin, eps=eps, dtype=kv_pages.dtype, fp8_scale=fp8_scale)
    pages, slots, is_written = destinations(
        page_table, starts, counts, num_rows=kv_down.shape[1], num_pages=N, page_size=page_size
    )
    return kv_pages.at[jnp.where(is_written, pages, N), slots].set(rows, mode="drop")


def read(
    kv_pages: Shaped[Array, "N Z W"],
    page_table: Int[Array, "B P"],
    seq_lens: Int[Array, "B"],
    *,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B S X"]:
    """`cache_read`."""
    N, page_size, _ = kv_pages.shape
    B, P = page_table.shape
    rows = kv_pages[jnp.clip(page_table, 0, N - 1)].reshape(B, P * page_size, -1)
    if kv_pages.dtype == jnp.uint8:
        rows = jnp.concatenate(unpack_fp8_cache_rows(rows), axis=-1)
    is_held = jnp.arange(P * page_size, dtype=jnp.int32)[None, :] < seq_lens.astype(jnp.int32)[:, None]
    return jnp.where(is_held[:, :, None], rows, jnp.zeros((), rows.dtype)).astype(dtype)
