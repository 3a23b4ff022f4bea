"""Causal attention by chunks of queries, with a backward pass that computes the probabilities again from lse.

Up to eight spans of queries are unrolled, each reading keys up to its own end only, which saves nearly half of the
operations; within a span longer than a chunk a loop takes one chunk at a time, so that the scores of one exist at once.
"""

import operator
from collections.abc import Callable
from functools import partial, reduce
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
SHORT_CHUNK = 128
"""In place of `CHUNK` in short rows: fewer scores above the diagonal."""
SHORT_ROW_FORWARD, SHORT_ROW_BACKWARD = 1024, 512
"""Most queries of a short row, in either pass: what was fastest on a CPU."""
MOST_SPANS = 8
MASKED = -1e30
"""Finite, so that a query without keys gives no NaN before its result is zeroed."""


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
    size = _chunk_size(T, q_starts, short_row=SHORT_ROW_FORWARD)
    all_see = q_segment_ids is None and q_starts is None
    outs, lses = [], []
    for start, end, num_keys in _spans(T, S, q_starts, size):
        keys = _first(Keys(k, v, kv_segment_ids), num_keys)

        def chunk(first, queries, keys=keys):
            seen = _seen(queries, keys, q_starts, S - T, first)
            return first + size, _forward(queries, keys, seen, softmax_scale, all_see=all_see)

        _, (out, lse) = _over_chunks(chunk, jnp.int32(start), _between(Queries(q, q_segment_ids), start, end), size)
        outs.append(out)
        lses.append(lse)
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
    size = _chunk_size(T, q_starts, short_row=SHORT_ROW_BACKWARD)
    delta = jnp.moveaxis(softmax_delta(out, d_out, d_lse), 1, 2)
    every = Queries(q, q_segment_ids, jnp.moveaxis(lse, 1, 2), delta, d_out)
    d_qs, d_ks, d_vs = [], [], []
    for start, end, num_keys in _spans(T, S, q_starts, size):
        keys = _first(Keys(k, v, kv_segment_ids), num_keys)

        def chunk(carry, queries, keys=keys):
            first, d_k, d_v = carry
            seen = _seen(queries, keys, q_starts, S - T, first)
            d_q, more_k, more_v = _gradients(queries, keys, seen, softmax_scale)
            return (first + size, d_k + more_k, d_v + more_v), d_q

        zeros = jnp.zeros(keys.k.shape, lse.dtype), jnp.zeros(keys.v.shape, lse.dtype)
        carry = jnp.int32(start), *varying_as(zeros, every, keys, q_starts)
        (_, d_k, d_v), d_q = _over_chunks(chunk, carry, _between(every, start, end), size)
        for results, result in ((d_qs, d_q), (d_ks, d_k), (d_vs, d_v)):
            results.append(result)
    return jnp.concatenate(d_qs, axis=1), _sum_over_spans(d_ks).astype(k.dtype), _sum_over_spans(d_vs).astype(v.dtype)


def _forward(queries: Queries, keys: Keys, seen, softmax_scale: float, *, all_see: bool):
    """One chunk: out [B, t, H, W] and lse [B, t, H]; `all_see` where each query is known to see a key."""
    scores_BHtS = jnp.where(seen, _scores(queries, keys, softmax_scale), MASKED)
    peak_BHt = scores_BHtS.max(axis=-1)
    weights_BHtS = jnp.exp(scores_BHtS - peak_BHt[..., None])
    total_BHt = weights_BHtS.sum(axis=-1)
    probabilities_BHtS = (weights_BHtS / total_BHt[..., None]).astype(keys.v.dtype)
    out_BtHW = _einsum("bhts,bshw->bthw", probabilities_BHtS, keys.v).astype(queries.q.dtype)
    lse_BtH = jnp.moveaxis(peak_BHt + jnp.log(total_BHt), 1, 2)
    if all_see:
        return out_BtHW, lse_BtH
    # From the mask, not from the scores: XLA then runs the softmax above as one pass on a CPU.
    sees_any = jnp.moveaxis(seen.any(axis=-1), 1, 2)
    return jnp.where(sees_any[..., None], out_BtHW, 0), jnp.where(sees_any, lse_BtH, jnp.inf)


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


def _chunk_size(num_queries: int, q_starts, *, short_row: int) -> int:
    """Queries whose scores exist at a time."""
    is_short = q_starts is None and num_queries <= short_row
    return min(SHORT_CHUNK if is_short else CHUNK, num_queries)


def _spans(num_queries: int, num_keys: int, q_starts, chunk: int) -> list[tuple[int, int, int]]:
    """(first query, end, keys that any of them may see), at most `MOST_SPANS`; all keys where starts are data."""
    size = chunk * -(-num_queries // (chunk * MOST_SPANS))
    ends = [min(start + size, num_queries) for start in range(0, num_queries, size)]
    visible = [num_keys if q_starts is not None else num_keys - num_queries + end for end in ends]
    return list(zip(range(0, num_queries, size), ends, visible, strict=True))


def _first(keys: Keys, count: int) -> Keys:
    return jax.tree.map(lambda x: x[:, :count], keys)


def _between(queries: Queries, start: int, end: int) -> Queries:
    return jax.tree.map(lambda x: x[:, start:end], queries)


def _over_chunks(chunk: Callable[..., Any], carry: Any, queries: Queries, size: int) -> Any:
    """`jax.lax.scan` of `chunk` over chunks of `size` queries, its results joined; a call where there is one chunk."""
    num_queries = queries.q.shape[1]
    if num_queries <= size:
        return chunk(carry, queries)
    carry, results = jax.lax.scan(chunk, carry, _chunks(queries, size))
    return carry, jax.tree.map(partial(_whole, size=num_queries), results)


def _chunks(queries: Queries, size: int) -> Queries:
    """[B, T, …] -> [n, B, size, …], filled up at the end: with lse = +inf, which makes filler's gradients 0."""

    def split(x: Array, filler: float) -> Array:
        fill = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, fill, constant_values=filler)
        return jnp.moveaxis(padded.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return Queries(*(None if x is None else split(x, jnp.inf if name == "lse" else 0)
                     for name, x in queries._asdict().items()))  # fmt: skip


def _whole(x: Array, *, size: int) -> Array:
    """[n, B, chunk, …] -> [B, size, …]: inverse of `_chunks`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :size]


def _sum_over_spans(parts: list[Array]) -> Array:
    """Sum over spans of [B, S, …] of which each has the keys it saw, no fewer than the one before."""
    begins = [0, *(part.shape[1] for part in parts)]
    sums = [
        reduce(operator.add, (part[:, begin : last.shape[1]] for part in parts[i:]))
        for i, (begin, last) in enumerate(zip(begins, parts, strict=False))
        if begin < last.shape[1]
    ]
    return jnp.concatenate(sums, axis=1)
