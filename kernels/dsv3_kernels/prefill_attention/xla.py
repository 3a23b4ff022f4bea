"""Causal attention by chunks of queries, with a backward pass that makes the probabilities again from lse.

Up to eight spans of queries are unrolled, each reading keys up to its own end only, which saves nearly half of the
operations; within a span a loop takes one chunk at a time, so that the scores of one chunk exist at once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.prefill_attention.differentiable import differentiable
from dsv3_kernels.prefill_attention.reference import wide_dtype
from dsv3_kernels.prefill_attention.visibility import query_positions, seen_keys
from dsv3_kernels.varying import varying_alike, varying_as

CHUNK = 256
"""Most queries whose scores exist at a time."""
MOST_SPANS = 8


class Queries(NamedTuple):
    """What there is of each query; of all [B, T, …] or in chunks [n, B, t, …]. The last three in the backward pass."""

    q: Any
    segment_ids: Any
    lse: Any = None
    delta: Any = None
    d_out: Any = None


class Keys(NamedTuple):
    """What there is of each key."""

    k: Float[Array, "B S H J"]
    v: Float[Array, "B S H W"]
    segment_ids: Int[Array, "B S"] | None


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
    """`mla_prefill` in memory linear in T and S."""
    settings = {"softmax_scale": softmax_scale}
    return differentiable(
        partial(_attend, **settings),
        partial(gradients, **settings),
        varying_alike(q, k, v, q_segment_ids, kv_segment_ids, q_starts),
    )


def softmax_delta(
    out: Float[Array, "B T H W"], d_out: Float[Array, "B T H W"], d_lse: Float[Array, "B H T"]
) -> Float[Array, "B H T"]:
    """Σ_s P dP - dlse = out·dout - dlse: what the gradient of a score subtracts from dP."""
    wide = d_lse.dtype
    return jnp.einsum("bthw,bthw->bht", out.astype(wide), d_out.astype(wide)) - d_lse


def _attend(q, k, v, q_segment_ids, kv_segment_ids, q_starts, *, softmax_scale):
    T, S = q.shape[1], k.shape[1]
    size = min(CHUNK, T)
    outs, lses = [], []
    for start, end, num_keys in _spans(T, S, q_starts):
        keys = _first(Keys(k, v, kv_segment_ids), num_keys)

        def chunk(first, queries, keys=keys):
            seen = _seen(queries, keys, q_starts, S - T, first)
            return first + size, _forward(queries, keys, seen, softmax_scale)

        _, (out, lse) = jax.lax.scan(chunk, jnp.int32(start), _chunks(Queries(q, q_segment_ids), start, end, size))
        outs.append(_whole(out, end - start))
        lses.append(_whole(lse, end - start))
    return jnp.concatenate(outs, axis=1), jnp.moveaxis(jnp.concatenate(lses, axis=1), 2, 1)


def gradients(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B S H J"],
    v: Float[Array, "B S H W"],
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_starts: Int[Array, "B"] | None,
    out: Float[Array, "B T H W"],
    lse: Float[Array, "B H T"],
    d_out: Float[Array, "B T H W"],
    d_lse: Float[Array, "B H T"],
    *,
    softmax_scale: float,
) -> tuple[Float[Array, "B T H J"], Float[Array, "B S H J"], Float[Array, "B S H W"]]:
    """d_q, d_k, d_v from both results of `attend` and their cotangents."""
    T, S = q.shape[1], k.shape[1]
    size = min(CHUNK, T)
    delta = jnp.moveaxis(softmax_delta(out, d_out, d_lse), 1, 2)
    every = Queries(q, q_segment_ids, jnp.moveaxis(lse, 1, 2), delta, d_out)
    d_k, d_v = jnp.zeros(k.shape, lse.dtype), jnp.zeros(v.shape, lse.dtype)
    d_k, d_v = varying_as((d_k, d_v), every, k, v, kv_segment_ids, q_starts)
    d_qs = []
    for start, end, num_keys in _spans(T, S, q_starts):
        keys = _first(Keys(k, v, kv_segment_ids), num_keys)

        def chunk(carry, queries, keys=keys):
            first, d_k, d_v = carry
            seen = _seen(queries, keys, q_starts, S - T, first)
            d_q, more_k, more_v = _gradients(queries, keys, seen, softmax_scale)
            return (first + size, d_k + more_k, d_v + more_v), d_q

        carry = (jnp.int32(start), d_k[:, :num_keys], d_v[:, :num_keys])
        (_, seen_k, seen_v), d_q = jax.lax.scan(chunk, carry, _chunks(every, start, end, size))
        d_k, d_v = d_k.at[:, :num_keys].set(seen_k), d_v.at[:, :num_keys].set(seen_v)
        d_qs.append(_whole(d_q, end - start))
    return jnp.concatenate(d_qs, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _forward(queries: Queries, keys: Keys, seen, softmax_scale: float):
    """One chunk: out [B, t, H, W] and lse [B, t, H]."""
    scores_BHtS = jnp.where(seen, _scores(queries, keys, softmax_scale), -jnp.inf)
    peak_BHt = scores_BHtS.max(axis=-1)
    peak_BHt = jnp.where(jnp.isfinite(peak_BHt), peak_BHt, 0.0)
    weights_BHtS = jnp.exp(scores_BHtS - peak_BHt[..., None])
    total_BHt = weights_BHtS.sum(axis=-1)
    sees_any = total_BHt > 0
    divisor_BtH = jnp.moveaxis(jnp.where(sees_any, total_BHt, 1.0), 1, 2)
    out = _einsum("bhts,bshw->bthw", weights_BHtS.astype(keys.v.dtype), keys.v) / divisor_BtH[..., None]
    lse = jnp.where(sees_any, peak_BHt + jnp.log(total_BHt), jnp.inf)
    return out.astype(queries.q.dtype), jnp.moveaxis(lse, 1, 2)


def _gradients(queries: Queries, keys: Keys, seen, softmax_scale: float):
    """One chunk: d_q, and what it adds to d_k and d_v."""
    lse_BHt, delta_BHt = (jnp.moveaxis(x, 2, 1)[..., None] for x in (queries.lse, queries.delta))
    scores_BHtS = jnp.where(seen, _scores(queries, keys, softmax_scale), -jnp.inf)
    p_BHtS = jnp.exp(scores_BHtS - lse_BHt)  # 0 where lse is +inf
    dtype = queries.q.dtype
    d_v = _einsum("bhts,bthw->bshw", p_BHtS.astype(dtype), queries.d_out)
    d_p_BHtS = _einsum("bthw,bshw->bhts", queries.d_out, keys.v)
    d_scores_BHtS = (p_BHtS * (d_p_BHtS - delta_BHt) * softmax_scale).astype(dtype)
    d_q = _einsum("bhts,bshj->bthj", d_scores_BHtS, keys.k)
    return d_q.astype(dtype), _einsum("bhts,bthj->bshj", d_scores_BHtS, queries.q), d_v


def _scores(queries: Queries, keys: Keys, softmax_scale: float) -> Float[Array, "B H t S"]:
    return _einsum("bthj,bshj->bhts", queries.q, keys.k) * softmax_scale


def _einsum(equation: str, x: Array, y: Array) -> Array:
    """Sums in float32, or in float64 for float64."""
    return jnp.einsum(equation, x, y, preferred_element_type=wide_dtype(x.dtype))


def _seen(queries: Queries, keys: Keys, q_starts, default_start: int, first):
    positions = query_positions(q_starts, queries.q.shape[1], default_start=default_start, first=first)
    kv_positions = jnp.arange(keys.k.shape[1], dtype=jnp.int32)
    return seen_keys(positions, kv_positions, queries.segment_ids, keys.segment_ids)[:, None]


def _spans(num_queries: int, num_keys: int, q_starts) -> list[tuple[int, int, int]]:
    """(first query, end, keys that any of them may see), at most `MOST_SPANS`; all keys where starts are data."""
    chunks = -(-num_queries // CHUNK)
    size = CHUNK * -(-chunks // MOST_SPANS)
    ends = [min(start + size, num_queries) for start in range(0, num_queries, size)]
    visible = [num_keys if q_starts is not None else num_keys - num_queries + end for end in ends]
    return list(zip(range(0, num_queries, size), ends, visible, strict=True))


def _first(keys: Keys, count: int) -> Keys:
    return jax.tree.map(lambda x: x[:, :count], keys)


def _chunks(queries: Queries, start: int, end: int, size: int) -> Queries:
    """[B, T, …] -> [n, B, size, …], filled up at the end: with lse = +inf, which makes filler's gradients 0."""

    def split(x: Array, filler: float) -> Array:
        fill = [(0, 0), (0, (start - end) % size)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x[:, start:end], fill, constant_values=filler)
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return Queries(*(None if x is None else split(x, jnp.inf if name == "lse" else 0)
                     for name, x in queries._asdict().items()))  # fmt: skip


def _whole(x: Array, size: int) -> Array:
    """[n, B, chunk, …] -> [B, size, …]: inverse of `_chunks`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :size]
