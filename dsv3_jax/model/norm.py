"""RMSNorm."""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Float


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], *, eps: float) -> Float[Array, "... D"]:
    """Divides each row by its root mean square, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale_row = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (x32 * inverse_rms * scale_row).astype(x.dtype)
