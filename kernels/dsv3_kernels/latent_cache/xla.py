"""Writing the latent cache by one scatter."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels.latent_cache.rows import destinations, new_rows


def write(
    kv_pages: Shaped[Array, "N Z W"],
    kv_down: Float[Array, "B T X"],
    norm_scale: Float[Array, "C"],
    cos: Float[Array, "B T halfR"],
    sin: Float[Array, "B T halfR"],
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
