"""Causal attention in full: the whole [T, S] matrix in float32, its gradient by autodiff."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.prefill_attention.visibility import query_positions, seen_keys


def attend(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B S H J"],
    v: Float[Array, "B S H W"],
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_starts: Int[Array, "B"] | None,
    *,
    softmax_scale: float,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B H T"]]:
    """`mla_prefill` by its equation."""
    dtype, wide = q.dtype, wide_dtype(q.dtype)
    q, k, v = q.astype(wide), k.astype(wide), v.astype(wide)
    T, S = q.shape[1], k.shape[1]
    positions = query_positions(q_starts, T, default_start=S - T)
    seen = seen_keys(positions, jnp.arange(S, dtype=jnp.int32), q_segment_ids, kv_segment_ids)[:, None]
    scores_BHTS = jnp.where(seen, jnp.einsum("bthj,bshj->bhts", q, k) * softmax_scale, -jnp.inf)
    peak_BHT = jax.lax.stop_gradient(scores_BHTS.max(axis=-1, initial=-jnp.inf))
    peak_BHT = jnp.where(jnp.isfinite(peak_BHT), peak_BHT, 0.0)
    weights_BHTS = jnp.exp(scores_BHTS - peak_BHT[..., None])
    total_BHT = weights_BHTS.sum(axis=-1)
    sees_any = total_BHT > 0
    divisor_BHT = jnp.where(sees_any, total_BHT, 1.0)
    out = jnp.einsum("bhts,bshw->bthw", weights_BHTS / divisor_BHT[..., None], v)
    lse = jnp.where(sees_any, peak_BHT + jnp.log(divisor_BHT), jnp.inf)
    return out.astype(dtype), lse


def wide_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What scores and sums have: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
