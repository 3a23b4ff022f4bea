"""MLA decoding as a CPU runs it: sequence by sequence and page by page, so that each sequence costs what it is long."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from dsv3_kernels.decode_attention.reference import to_floats
from dsv3_kernels.varying import varying_as


def mla_decode_loops(
    q_latent: Float[Array, "B S H C"],
    q_rope: Float[Array, "B S H R"],
    kv_pages: Shaped[Array, "N 64 W"],
    page_table: Int32[Array, "B P"],
    seq_lens: Int32[Array, "B"],
    *,
    softmax_scale: float,
    causal: bool = True,
) -> tuple[Float[Array, "B S H C"], Float32[Array, "B H S"]]:
    """Twin of `mla_decode_reference`: matmuls in the cache's dtype, sums in float32, one running maximum a row.

    No page behind a sequence's end is read, whatever the table has room for, and what a sequence gets are the same bits
    whichever others stand beside it.
    """
    B, S, H, C = q_latent.shape
    query = jnp.concatenate([q_latent, q_rope], axis=-1).reshape(B, S * H, -1)
    page_ids = jnp.clip(page_table, 0, kv_pages.shape[0] - 1)
    behind = S - jnp.arange(S, dtype=jnp.int32) if causal else jnp.ones(S, jnp.int32)
    attend = functools.partial(
        _attend, kv_pages=kv_pages, behind=jnp.repeat(behind, H), latent_dim=C, softmax_scale=softmax_scale
    )
    out, lse = lax.map(lambda sequence: attend(*sequence), (query, page_ids, seq_lens))
    return out.astype(q_latent.dtype).reshape(B, S, H, C), lse.reshape(B, S, H).transpose(0, 2, 1)


def _attend(
    query: Float[Array, "M X"],
    page_ids: Int32[Array, "P"],
    length: Int32[Array, ""],
    *,
    kv_pages: Shaped[Array, "N 64 W"],
    behind: Int32[Array, "M"],
    latent_dim: int,
    softmax_scale: float,
) -> tuple[Float32[Array, "M C"], Float32[Array, "M"]]:
    """One sequence; the last key that a query sees lies `behind` the sequence's end."""
    page_size = kv_pages.shape[1]
    last_visible = length - behind

    def attend_to_page(i, carry):
        out, total, maximum = carry
        position = i * page_size + jnp.arange(page_size, dtype=jnp.int32)
        kv = to_floats(lax.dynamic_index_in_dim(kv_pages, page_ids[i], keepdims=False))
        kv = jnp.where((position < length)[:, None], kv, jnp.zeros((), kv.dtype))  # unused slots may hold NaN
        scores = jnp.einsum("xy,ky->xk", query, kv, preferred_element_type=jnp.float32) * softmax_scale
        scores = jnp.where(position[None, :] <= last_visible[:, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        # While a row has seen no key its maximum is -inf, and -inf - -inf is NaN: measure from zero then.
        origin = jnp.where(jnp.isinf(new_maximum), 0.0, new_maximum)
        weights = jnp.exp(scores - origin[:, None])
        decay = jnp.exp(maximum - origin)
        product = jnp.einsum(
            "xk,kc->xc", weights.astype(kv.dtype), kv[:, :latent_dim], preferred_element_type=jnp.float32
        )
        return out * decay[:, None] + product, total * decay + weights.sum(-1), new_maximum

    rows = query.shape[0]
    start = (
        jnp.zeros((rows, latent_dim), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
    )
    start = varying_as(start, query, kv_pages, page_ids, length)
    out, total, maximum = lax.fori_loop(0, (length + page_size - 1) // page_size, attend_to_page, start)
    has_keys = last_visible >= 0
    total = jnp.where(has_keys, total, 1.0)
    out = jnp.where(has_keys[:, None], out / total[:, None], 0.0)
    return out, jnp.where(has_keys, maximum + jnp.log(total), jnp.inf)
