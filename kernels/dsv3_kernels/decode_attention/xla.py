"""MLA decoding on GPUs without the kernels: a loop over chunks of pages, each gathered and attended to with einsums.

Memory is that of one chunk, whatever the length; the loop runs to the longest sequence of the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from dsv3_kernels.decode_attention.reference import to_floats
from dsv3_kernels.varying import varying_as

PAGES_PER_CHUNK = 16
"""1024 keys: matrices large enough for any backend; at batch 128 the gathered rows are 151 MB."""


def mla_decode_xla(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "B S H R"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Twin of `mla_decode_reference`: matmuls in the cache's dtype, sums in float32, one running maximum a row."""
    B, S, H, C = q_latent.shape
    num_pages, page_size, _ = kv_pages.shape
    pages_per_chunk = min(PAGES_PER_CHUNK, page_table.shape[1])
    chunk_size = pages_per_chunk * page_size
    # The table is padded, because a slice that runs past the end would be moved back.
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % pages_per_chunk)))
    query = jnp.concatenate([q_latent, q_rope], axis=-1)
    last_visible = seq_lens[:, None] - 1 + jnp.zeros((1, S), jnp.int32)
    if causal:
        last_visible = last_visible - S + 1 + jnp.arange(S, dtype=jnp.int32)[None, :]

    def attend_to_chunk(i, carry):
        out, total, maximum = carry
        ids = jax.lax.dynamic_slice_in_dim(page_table, i * pages_per_chunk, pages_per_chunk, axis=1)
        position = i * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)
        rows = kv_pages[jnp.clip(ids, 0, num_pages - 1)].reshape(B, chunk_size, kv_pages.shape[2])
        kv = to_floats(rows)
        is_held = position[None, :] < seq_lens[:, None]
        kv = jnp.where(is_held[:, :, None], kv, jnp.zeros((), kv.dtype))  # unused slots may hold NaN
        scores = jnp.einsum("bshw,bkw->bshk", query, kv, preferred_element_type=jnp.float32) * softmax_scale
        is_visible = position[None, None, :] <= last_visible[:, :, None]
        scores = jnp.where(is_visible[:, :, None, :], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        # While a row has seen no key its maximum is -inf, and -inf - -inf is NaN: measure from zero then.
        origin = jnp.where(jnp.isinf(new_maximum), 0.0, new_maximum)
        weights = jnp.exp(scores - origin[..., None])
        decay = jnp.exp(maximum - origin)
        product = jnp.einsum(
            "bshk,bkc->bshc", weights.astype(kv.dtype), kv[:, :, :C], preferred_element_type=jnp.float32
        )
        return out * decay[..., None] + product, total * decay + weights.sum(-1), new_maximum

    num_chunks = (jnp.max(seq_lens, initial=0) + chunk_size - 1) // chunk_size
    start = (
        jnp.zeros((B, S, H, C), jnp.float32),
        jnp.zeros((B, S, H), jnp.float32),
        jnp.full((B, S, H), -jnp.inf, jnp.float32),
    )
    start = varying_as(start, query, kv_pages, page_table, seq_lens)
    out, total, maximum = jax.lax.fori_loop(0, num_chunks, attend_to_chunk, start)
    has_keys = (last_visible >= 0)[:, :, None]
    total = jnp.where(has_keys, total, 1.0)
    out = jnp.where(has_keys[..., None], out / total[..., None], 0.0)
    lse = jnp.where(has_keys, maximum + jnp.log(total), jnp.inf)
    return out.astype(q_latent.dtype), lse.transpose(0, 2, 1)
