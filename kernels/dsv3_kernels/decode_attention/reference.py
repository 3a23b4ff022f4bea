"""MLA decoding in float32, one softmax over all keys of a sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from dsv3_kernels.latent_cache.fp8_rows import unpack_fp8_cache_rows


def mla_decode_reference(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "B S H R"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Attention of each query over the latent rows of its sequence; the values are the first C columns of the keys."""
    B, S, _, C = q_latent.shape
    num_pages, page_size, _ = kv_pages.shape
    num_keys = page_table.shape[1] * page_size
    position = jnp.arange(num_keys, dtype=jnp.int32)

    is_held = position[None, :] < seq_lens[:, None]
    rows = kv_pages[jnp.clip(page_table, 0, num_pages - 1)].reshape(B, num_keys, kv_pages.shape[2])
    kv = to_floats(rows).astype(jnp.float32)
    kv = jnp.where(is_held[:, :, None], kv, 0.0)  # unused slots may hold NaN, and 0 * NaN is NaN

    query = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32)
    scores = softmax_scale * jnp.einsum("bshw,bkw->bhsk", query, kv, precision="highest")
    is_visible = is_held[:, None, :]
    if causal:
        last_visible = seq_lens[:, None] - S + jnp.arange(S, dtype=jnp.int32)[None, :]
        is_visible = is_visible & (position[None, None, :] <= last_visible[:, :, None])
    scores = jnp.where(is_visible[:, None, :, :], scores, -jnp.inf)

    has_keys = is_visible.any(-1)[:, None, :]
    lse = jnp.where(has_keys, jax.nn.logsumexp(scores, axis=-1), jnp.inf)
    weights = jnp.where(has_keys[..., None], jnp.exp(scores - lse[..., None]), 0.0)
    out = jnp.einsum("bhsk,bkc->bshc", weights, kv[:, :, :C], precision="highest")
    return out.astype(q_latent.dtype), lse


def to_floats(rows: Shaped[Array, "*batch W"]) -> Float[Array, "*batch X"]:
    """Cache rows as floats: bytes of the FP8 cache are dequantised to BF16, anything else is passed on."""
    if rows.dtype != jnp.uint8:
        return rows
    return jnp.concatenate(unpack_fp8_cache_rows(rows), axis=-1)
