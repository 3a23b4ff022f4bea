"""Attention over cached latents: every head reads the same C + R numbers a token."""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Bool, Float


def attend_latent(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    cache: Float[Array, "B S X"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Float[Array, "B T H C"]:
    """softmax(scale·[q_latent; q_rope]·cache)·cache[:C], over the visible rows, softmax in float32.

    Multi-query attention with one key/value head, which is what makes decoding with MLA cheap. A row of
    `visible` must mark at least one key; a row of the cache that nobody may read can hold anything, NaN too.
    """
    latent_dim = q_latent.shape[-1]
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    scores = jnp.einsum("bthx,bsx->bhts", q, cache, preferred_element_type=jnp.float32) * scale
    probabilities = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    values = jnp.where(visible.any(axis=1)[:, :, None], cache[..., :latent_dim], 0)  # because 0·NaN is NaN
    return jnp.einsum("bhts,bsc->bthc", probabilities.astype(cache.dtype), values)
