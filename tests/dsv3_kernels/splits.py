"""Calls of every op, and of gradients, with ways in which two devices can share their arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import dsv3_kernels as kernels
from dsv3_jax.precision import fp8_linear
from dsv3_kernels import QTensor
from dsv3_kernels.varying import varying_axes
from tests.precision.fp8_routed import routed as experts

P = jax.sharding.PartitionSpec
FIRST, SECOND, THIRD, LAST, ALL = P("data"), P(None, "data"), P(None, None, "data"), P(None, None, None, "data"), P()


class Split(NamedTuple):
    """How two devices share the arrays of an op: `out` is how its result lies on them, None for a sum over both."""

    op: Callable[..., Any]
    arrays: tuple[Any, ...]
    specs: tuple[Any, ...]
    out: Any


def normal(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def ids(*numbers: Any) -> np.ndarray:
    return np.array(numbers, np.int32)


def add(a: QTensor, b: QTensor, sums: jax.Array) -> jax.Array:
    return kernels.fp8_gemm(a, b, out_dtype=jnp.float32, accumulate_into=sums)


decode = functools.partial(kernels.mla_decode, softmax_scale=0.1)
prefill = functools.partial(kernels.mla_prefill, softmax_scale=0.1)
write = functools.partial(kernels.cache_write, eps=1e-6)
wide_gemm = functools.partial(kernels.fp8_gemm, out_dtype=jnp.float32)
three_groups = functools.partial(kernels.grouped_fp8_gemm_k, num_groups=3)
three_weights = functools.partial(kernels.grouped_matmul_k, num_groups=3)


by_token = functools.partial(kernels.quantize_tiles, tile=(1, 128))
by_block = functools.partial(kernels.quantize_tiles, tile=(128, 128))


def splits() -> dict[str, Split]:
    """NumPy arrays of the smallest shapes that the Hopper kernels take on each device."""
    tokens, weight = by_token(normal(256, 256)), by_block(normal(256, 256))
    rows, columns = by_token(normal(512, 256)), by_token(normal(128, 512))
    slabs = QTensor(tokens.values.reshape(4, 64, 256), tokens.scales.reshape(4, 64, 2))
    experts = by_block(normal(4, 128, 256))
    q, v = normal(2, 64, 2, 192), normal(2, 64, 2, 128)
    queries, pages = (normal(2, 1, 4, 512), normal(2, 1, 4, 64)), normal(4, 64, 576)
    table, own_table, lengths = ids([0, 1], [2, 3]), ids([0, 1], [0, 1]), ids(100, 7)
    angles = [normal(2, 1, 32, dtype=np.float32)] * 2
    new, at = (normal(2, 1, 576), normal(512, dtype=np.float32), *angles), (ids(63, 5), ids(1, 1))
    of_new = (FIRST, ALL, *[FIRST] * 5)
    empty, wide = np.zeros_like(pages), normal(4, 2048)
    return {
        "gemm: rows": Split(kernels.fp8_gemm, (tokens, weight), (FIRST, ALL), FIRST),
        "gemm: columns": Split(kernels.fp8_gemm, (tokens, weight), (ALL, FIRST), SECOND),
        "wide gemm: contraction": Split(wide_gemm, (tokens, weight), (SECOND, SECOND), None),
        "adding gemm: rows": Split(
            add, (tokens, weight, normal(256, 256, dtype=np.float32)), (FIRST, ALL, FIRST), FIRST
        ),
        "grouped: rows": Split(
            kernels.grouped_fp8_gemm, (rows, experts, ids(0, 3, -1, 3)), (FIRST, ALL, FIRST), FIRST
        ),
        "masked: groups": Split(
            kernels.grouped_fp8_gemm_masked, (slabs, experts, ids(64, 0, 5, 64)), (FIRST, FIRST, FIRST), FIRST
        ),
        "contraction: tokens": Split(three_groups, (columns, columns, ids(0, 2, 2, 2)), (SECOND, SECOND, FIRST), None),
        "short contraction: columns": Split(
            three_groups, (columns, by_token(normal(256, 512)), ids(0, 2, 2, -1)), (ALL, FIRST, ALL), THIRD
        ),
        "grouped bf16: rows": Split(
            kernels.grouped_matmul, (normal(256, 64), normal(4, 64, 128), ids(0, 3, -1, 3)), (FIRST, ALL, FIRST), FIRST
        ),
        "grouped bf16: columns": Split(
            kernels.grouped_matmul, (normal(256, 64), normal(4, 64, 128), ids(0, 3, -1, 3)), (ALL, THIRD, ALL), SECOND
        ),
        "bf16 contraction: tokens": Split(
            three_weights, (normal(256, 64), normal(256, 128), ids(0, 2, 2, 2)), (FIRST, FIRST, FIRST), None
        ),
        "cast: tokens": Split(kernels.cast_tokens, (wide,), (FIRST,), FIRST),
        "cast: channels": Split(kernels.cast_tokens, (wide,), (SECOND,), SECOND),
        "swiglu: tokens": Split(kernels.swiglu_cast, (wide,), (FIRST,), FIRST),
        "blocks: rows": Split(kernels.cast_blocks, (normal(256, 256),), (FIRST,), FIRST),
        "requantized: tokens": Split(kernels.requantize_transposed, (tokens,), (FIRST,), SECOND),
        "decode: sequences": Split(
            decode, (*queries, pages, table, lengths), (FIRST, FIRST, ALL, FIRST, FIRST), FIRST
        ),
        "decode: heads": Split(
            decode, (*queries, pages, table, lengths), (THIRD, THIRD, ALL, ALL, ALL), (THIRD, SECOND)
        ),
        "decode: pages": Split(
            decode, (*queries, pages, own_table, lengths), (FIRST,) * 5, FIRST
        ),
        "prefill: sequences": Split(prefill, (q, q, v), (FIRST, FIRST, FIRST), FIRST),
        "prefill: heads": Split(prefill, (q, q, v), (THIRD, THIRD, THIRD), (THIRD, SECOND)),
        "write: rows": Split(write, (empty, *new, table, *at), (ALL, *of_new), None),
        "write: pages": Split(
            write, (empty, *new, own_table, *at), (FIRST, *of_new), FIRST
        ),
        "read: sequences": Split(kernels.cache_read, (pages, table, lengths), (ALL, FIRST, FIRST), FIRST),
        "read: pages": Split(
            kernels.cache_read, (pages, own_table, lengths), (FIRST, FIRST, FIRST), FIRST
        ),
    }  # fmt: skip


def gradient(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """(arrays of `function`, cotangent of its result) -> gradients of the first `count` arrays."""

    def gradients(*arrays: Any) -> Any:
        *given, cotangent = arrays
        _, pullback = jax.vjp(lambda *x: function(*x, *given[count:]), *given[:count])
        return pullback(cotangent)

    return gradients


def starting(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> Any:
    """Attention of queries whose first stands at `start`."""
    return prefill(q, k, v, q_starts=jnp.broadcast_to(start, q.shape[0]))


def layer(name: str) -> Callable[..., Any]:
    return functools.partial(getattr(fp8_linear, name), dtype=jnp.bfloat16)


def bf16_experts(x: Any, gate_up: Any, down: Any, weights: Any, chosen: Any) -> Any:
    plan = kernels.plan_blocks(chosen, len(down), block_size=64)
    rows, weight = kernels.gather_rows(x, plan), kernels.row_weights(weights, plan)
    gate_up, down = gate_up.astype(x.dtype), down.astype(x.dtype)
    return kernels.sum_rows(kernels.expert_ffn(rows, gate_up, down, weight, plan.block_expert), plan)


def summed_experts(*arrays: Any) -> Any:
    """`experts`, of which each device has a part of the features."""
    parts = experts(*arrays)
    return jax.lax.psum(parts, varying_axes(parts))


def gradients() -> dict[str, Split]:
    """As `splits`, for gradients; that of an array that devices share is the sum of theirs."""
    q, v = normal(2, 256, 2, 192), normal(2, 256, 2, 128)
    d_attended = v, normal(2, 2, 256, dtype=np.float32)
    attend, attend_from = gradient(prefill, 3), gradient(starting, 3)
    x, w, d_y = normal(256, 256), normal(256, 256, dtype=np.float32), normal(256, 256)
    by_tokens = (FIRST, ALL, FIRST), (FIRST, ALL)
    by_columns = (ALL, SECOND, SECOND), (ALL, SECOND)
    gate_up, down = normal(2, 256, 2, 256, dtype=np.float32), normal(2, 256, 256, dtype=np.float32)
    # The tokens of a device choose one expert, so that blocks of rows are the same on one device and on two.
    routed = x, gate_up / 16, down / 16, np.abs(normal(256, 1, dtype=np.float32)), np.repeat(ids(0, 1), 128)[:, None]
    wide = normal(256, 512)
    return {
        "gradient of prefill: sequences": Split(attend, (q, q, v, d_attended), (FIRST,) * 4, FIRST),
        "gradient of prefill: heads": Split(attend, (q, q, v, d_attended), (*[THIRD] * 3, (THIRD, SECOND)), THIRD),
        "gradient of prefill: queries": Split(
            attend_from, (q, q, v, ids(0, 128), d_attended), (SECOND, ALL, ALL, FIRST, (SECOND, THIRD)),
            (SECOND, ALL, ALL),
        ),
        "gradient of linear: tokens": Split(gradient(layer("linear"), 2), (x, w, d_y), *by_tokens),
        "gradient of linear: columns": Split(gradient(layer("linear"), 2), (x, w, d_y), *by_columns),
        "gradient of swiglu: columns": Split(gradient(layer("swiglu_linear"), 2), (wide, w, d_y), *by_columns),
        "gradient of attention: columns": Split(gradient(layer("attention_linear"), 2), (x, w, d_y), *by_columns),
        "gradient of experts: tokens": Split(
            gradient(experts, 4), (*routed, d_y), (FIRST, ALL, ALL, *[FIRST] * 3), (FIRST, ALL, ALL, FIRST)
        ),
        "gradient of bf16 experts: tokens": Split(
            gradient(bf16_experts, 4), (*routed, d_y), (FIRST, ALL, ALL, *[FIRST] * 3), (FIRST, ALL, ALL, FIRST)
        ),
        "gradient of experts: features": Split(
            gradient(summed_experts, 4), (*routed, d_y), (ALL, LAST, SECOND, ALL, ALL, ALL), (ALL, LAST, SECOND, ALL)
        ),
    }  # fmt: skip


OPS = splits()
SPLITS = OPS | gradients()


@functools.cache
def of_one_device(what: str) -> Any:
    """The result of the first split of `what` on one device: all of its splits give that."""
    split = next(split for name, split in SPLITS.items() if name.startswith(f"{what}:"))
    return jax.jit(split.op)(*split.arrays)
