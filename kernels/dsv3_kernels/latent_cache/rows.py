"""From MLA's down-projection to the rows of the latent cache (report eq. 1 and 3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows


def new_rows(
    kv_down: Float[Array, "B T X"],
    norm_scale: Float[Array, "C"],
    cos: Float[Array, "B T R_half"],
    sin: Float[Array, "B T R_half"],
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
    """`destination` of each new row."""
    of_row = functools.partial(destination, num_pages=num_pages, page_size=page_size)
    of_sequence = jax.vmap(of_row, in_axes=(None, None, None, 0))
    page_table, starts, counts = (x.astype(jnp.int32) for x in (page_table, starts, counts))
    return jax.vmap(of_sequence, in_axes=(0, 0, 0, None))(
        page_table, starts, counts, jnp.arange(num_rows, dtype=jnp.int32)
    )


def destination(
    pages: Any, start: jax.Array, count: jax.Array, t: jax.Array, *, num_pages: int, page_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Page and slot of a sequence's new row t, and whether it has one: not past its count, its table or the last page.

    All are int32 scalars, but `pages` [P], which may be a reference in a kernel.
    """
    position = jnp.maximum(start + t, 0)
    column, slot = jax.lax.div(position, jnp.int32(page_size)), jax.lax.rem(position, jnp.int32(page_size))
    page = pages[jnp.minimum(column, pages.shape[0] - 1)]
    is_written = (t < count) & (start + t >= 0) & (column < pages.shape[0])
    return page, slot, is_written & (page >= 0) & (page < num_pages)
