"""What the Hopper kernel of `mla_decode` does not take."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels.decode_attention.planner import MAX_LENGTH
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM

MAX_PAGES = MAX_LENGTH // 64
"""Of a sequence."""


def refuses(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    *rest: Any,
    softmax_scale: float,
    causal: bool,
) -> str | None:
    """The reason, or None: widths and dtypes other than DeepSeek-V3's, a scale that is not positive, endless tables."""
    widths = (q_latent.shape[3], q_rope.shape[3])
    if widths != (LATENT_DIM, ROPE_DIM) or q_latent.dtype != jnp.bfloat16:
        return (
            f"takes bfloat16 heads of {LATENT_DIM} + {ROPE_DIM}, not {q_latent.dtype} of {widths[0]} + {widths[1]}: "
            "cast the queries and the cache"
        )
    if softmax_scale <= 0:
        return f"finds maxima before it scales, and softmax_scale={softmax_scale} is not positive: negate the queries"
    if page_table.shape[1] > MAX_PAGES:
        return f"takes {MAX_PAGES} pages a sequence, not {page_table.shape[1]}: cut page_table to what lengths need"
    return None
