"""What the Hopper kernel of `cache_write` does not take."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM

DTYPES = ((jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.uint8, jnp.bfloat16))
"""Of the pages and the down-projection."""


def refuses(kv_pages: jax.Array, kv_down: jax.Array, norm_scale: jax.Array, *arrays: Any, **static: Any) -> str | None:
    """The reason, or None: widths and dtypes other than DeepSeek-V3's, or nothing to write."""
    C, X = norm_scale.shape[0], kv_down.shape[2]
    if (C, X - C) != (LATENT_DIM, ROPE_DIM):
        return f"writes rows of {LATENT_DIM} + {ROPE_DIM}, not of {C} + {X - C}"
    if (kv_pages.dtype, kv_down.dtype) not in DTYPES:
        return (
            "writes BF16 pages from bfloat16 or float32, FP8 pages from bfloat16, not "
            f"{kv_pages.dtype} pages from {kv_down.dtype}: cast kv_down"
        )
    if not kv_down.size or not kv_pages.size:
        return f"has no rows or no pages, kv_down {kv_down.shape} or kv_pages {kv_pages.shape}: skip the call"
    return None
