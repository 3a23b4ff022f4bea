"""Writing the latent cache one row after another."""

import jax
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
    """`cache_write` by a loop over rows."""
    B, T, _ = kv_down.shape
    N, page_size, W = kv_pages.shape
    rows = new_rows(kv_down, norm_scale, cos, sin, eps=eps, dtype=kv_pages.dtype, fp8_scale=fp8_scale)
    rows = rows.reshape(B * T, 1, 1, W)
    pages, slots, is_written = (
        x.reshape(B * T) for x in destinations(page_table, starts, counts, num_rows=T, num_pages=N, page_size=page_size)
    )

    def write_one(i, kv_pages):
        place = (pages[i], slots[i], jnp.int32(0))
        written = jax.lax.dynamic_update_slice(kv_pages, rows[i], place)
        return jnp.where(is_written[i], written, kv_pages)

    return jax.lax.fori_loop(0, B * T, write_one, kv_pages)
