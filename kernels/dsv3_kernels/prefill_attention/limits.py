"""What the Hopper kernels of `mla_prefill` do not take."""

from typing import Any

import jax
import jax.numpy as jnp

QK_DIM, V_DIM = 192, 128


def refuses(q: jax.Array, k: jax.Array, v: jax.Array, *arrays: Any, softmax_scale: float) -> str | None:
    """The reason, or None: head sizes and dtypes other than DeepSeek-V3's, or a scale that is not positive."""
    if q.dtype != jnp.bfloat16 or (q.shape[3], v.shape[3]) != (QK_DIM, V_DIM):
        return (
            f"takes bfloat16 with head sizes {QK_DIM} and {V_DIM}, not {q.dtype} with {q.shape[3]} and {v.shape[3]}: "
            "cast or pad the heads"
        )
    if softmax_scale <= 0:
        return f"finds maxima before it scales, and softmax_scale={softmax_scale} is not positive: negate the queries"
    return None
