"""Prefill attention on Hopper: from any lengths to whole tiles, and from the kernels to a function with a gradient."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.aot.case import BF16_MMA, AotCase
from dsv3_kernels.prefill_attention.block_ranges import Overlaps, overlaps, visits
from dsv3_kernels.prefill_attention.differentiable import differentiable
from dsv3_kernels.prefill_attention.pallas_forward import KV_BLOCK, forward
from dsv3_kernels.prefill_attention.pallas_key_gradients import key_gradients
from dsv3_kernels.prefill_attention.pallas_parts import LOG2E, QK_DIM, ROWS, TILE, V_DIM
from dsv3_kernels.prefill_attention.pallas_query_gradients import query_gradients
from dsv3_kernels.prefill_attention.xla import softmax_delta


def attend(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B S H J"],
    v: Float[Array, "B S H W"],
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_starts: Int[Array, "B"] | None,
    *,
    softmax_scale: float,
    interpret: Any = None,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B H T"]]:
    """`mla_prefill` in bfloat16 with head sizes 192 and 128."""
    ids = [None if x is None else x.astype(jnp.int32) for x in (q_segment_ids, kv_segment_ids)]
    settings = {"softmax_scale": softmax_scale, "interpret": interpret}
    return differentiable(
        partial(_attend, **settings), partial(gradients, **settings), (q, k, v, *ids, _starts(q, k, q_starts))
    )


def _starts(q: Array, k: Array, q_starts: Array | None) -> Int[Array, "B"]:
    """Bottom-right by default."""
    if q_starts is None:
        return jnp.full(q.shape[0], k.shape[1] - q.shape[1], jnp.int32)
    return q_starts.astype(jnp.int32)


class _Padded(NamedTuple):
    """The inputs of the kernels: filled up to whole tiles, zeros in rows, the last id in ids."""

    q: Any
    k: Any
    v: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    q_starts: Any


def _padded(q, k, v, q_segment_ids, kv_segment_ids, q_starts) -> _Padded:
    q_ids, kv_ids = (None if x is None else _fill(x, mode="edge") for x in (q_segment_ids, kv_segment_ids))
    return _Padded(_fill(q), _fill(k), _fill(v), q_ids, kv_ids, q_starts)


def _fill(x: Array, axis: int = 1, **kwargs) -> Array:
    extra = -x.shape[axis] % TILE
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)], **kwargs) if extra else x


def _overlaps(given: _Padded, num_keys: int, *, q_tile: int, kv_block: int) -> Overlaps:
    return overlaps(
        given.q_segment_ids,
        given.kv_segment_ids,
        given.q_starts,
        q_tiles=given.q.shape[1] // q_tile,
        kv_blocks=given.k.shape[1] // kv_block,
        q_tile=q_tile,
        kv_block=kv_block,
        num_keys=num_keys,
    )


def _attend(q, k, v, q_segment_ids, kv_segment_ids, q_starts, *, softmax_scale, interpret):
    T, S = q.shape[1], k.shape[1]
    given = _padded(q, k, v, q_segment_ids, kv_segment_ids, q_starts)
    ranges = visits(*_overlaps(given, S, q_tile=TILE, kv_block=KV_BLOCK))
    out, lse = forward(*given, ranges, softmax_scale=softmax_scale, num_keys=S, interpret=interpret)
    return out[:, :T], lse[:, :, :T]


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
    interpret: Any = None,
) -> tuple[Float[Array, "B T H J"], Float[Array, "B S H J"], Float[Array, "B S H W"]]:
    """d_q, d_k, d_v from both results of `attend`, which knows what the kernels take, and their cotangents."""
    T, S = q.shape[1], k.shape[1]
    given = _padded(q, k, v, q_segment_ids, kv_segment_ids, _starts(q, k, q_starts))
    delta = _fill(softmax_delta(out, d_out, d_lse), axis=2)
    lse2 = _fill(lse * LOG2E, axis=2, constant_values=jnp.inf)  # filler's probabilities are then 0
    rows = (_fill(d_out), lse2, delta)
    of_keys = _overlaps(given, S, q_tile=ROWS, kv_block=TILE)
    of_keys = visits(of_keys.some.swapaxes(1, 2), of_keys.every.swapaxes(1, 2))
    of_queries = visits(*_overlaps(given, S, q_tile=TILE, kv_block=ROWS))
    settings = {"softmax_scale": softmax_scale, "interpret": interpret}
    d_k, d_v = key_gradients(*given, of_keys, *rows, **settings)
    d_q = query_gradients(*given, of_queries, *rows, num_keys=S, **settings)
    return d_q[:, :T], d_k[:, :S], d_v[:, :S]


def aot_cases() -> list[AotCase]:
    """Each kernel with and without segment ids, and with keys that do not fill their last block."""
    B, T, S, H = 1, 1024, 2048, 16

    def array(*shape: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (array(B, T, H, V_DIM), array(B, H, T, dtype=jnp.float32), array(B, H, T, dtype=jnp.float32))
    by_queries, by_keys = array(B, T // TILE, 4, dtype=jnp.int32), array(B, S // TILE, 4, dtype=jnp.int32)
    cases = []
    for kind, ids in (("", (None, None)), (" packed", tuple(array(B, n, dtype=jnp.int32) for n in (T, S)))):
        given = (array(B, T, H, QK_DIM), array(B, S, H, QK_DIM), array(B, S, H, V_DIM), *ids, array(B, dtype=jnp.int32))
        settings = {"softmax_scale": QK_DIM**-0.5}
        odd = settings | {"num_keys": S - 1}
        kernels = {
            f"forward {TILE}x{KV_BLOCK}": (partial(forward, **odd), (*given, by_queries)),
            f"dkv {TILE}x{ROWS}": (partial(key_gradients, **settings), (*given, by_keys, *rows)),
            f"dq {TILE}x{ROWS}": (partial(query_gradients, **odd), (*given, by_queries, *rows)),
        }
        for name, (function, args) in kernels.items():
            cases.append(AotCase(f"mla_prefill {name}{kind}", function, args, must_contain=(BF16_MMA,)))
    return cases
