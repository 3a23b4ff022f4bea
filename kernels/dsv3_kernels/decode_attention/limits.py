"""What the Hopper kernel of `mla_decode` does not take."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, ROPE_DIM


def refuses(q_latent: jax.Array, q_rope: jax.Array, *arrays: Any, softmax_scale: float, causal: bool) -> str | None:
    """The reason, or None: widths and dtypes other than DeepSeek-V3's, or a scale that is not positive."""
    widths = (q_latent.shape[3], q_rope.shape[3])
    if widths != (LATENT_DIM, ROPE_DIM) or q_latent.dtype != jnp.bfloat16:
        return (
            f"takes bfloat16 heads of {LATENT_DIM} + {ROPE_DIM}, not {q_latent.dtype} of {widths[0]} + {widths[1]}: "
            "cast the queries and the cache"
        )
    if softmax_scale <= 0:
        return f"finds maxima before it scales, and softmax_scale={softmax_scale} is not positive: negate the queries"
    return None
