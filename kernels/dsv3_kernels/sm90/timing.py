"""The time of a kernel on this machine's GPU, for the choice among tiles."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90.model import Problem
from dsv3_kernels.sm90.tile import Tile

FLUSH_BYTES = 256 * 2**20
"""Written between calls: five times the L2 of an H100."""
CALLS = 20
Call = Callable[[Tile], Callable[[], jax.Array]]


def make_call(kind: str, problem: Problem) -> Call:
    """call(tile) gives a function that multiplies random operands of the problem, fresh for each problem."""
    from dsv3_kernels.gemm import pallas_sm90 as gemm
    from dsv3_kernels.grouped_gemm import pallas_sm90 as grouped

    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    dtype = problem.out_dtype
    if kind == "dense":
        a, b = _operand((m, k), 1), _operand((n, k), 1 if problem.is_b_scaled_by_row else 128)
        return lambda tile: _bound(lambda a, b: gemm.fp8_gemm(a, b, out_dtype=dtype, tile=tile), a, b)
    if kind == "contiguous":
        weights = _operand((8, n, k), 128)
        lists = jnp.asarray(np.arange(m // 128) * 8 // (m // 128), jnp.int32)
        a = _operand((m, k), 1)
        return lambda tile: _bound(
            lambda a, b, g: grouped.grouped_fp8_gemm(a, b, g, out_dtype=dtype, tile=tile), a, weights, lists
        )
    if kind == "masked":
        a, b, lists = _operand((groups, m, k), 1), _operand((groups, n, k), 128), jnp.full(groups, m, jnp.int32)
        return lambda tile: _bound(
            lambda a, b, v: grouped.grouped_fp8_gemm_masked(a, b, v, out_dtype=dtype, tile=tile), a, b, lists
        )
    a, b = _operand((m, k * groups), 1), _operand((n, k * groups), 1)
    lists = jnp.asarray(np.repeat(np.arange(groups), k // 128), jnp.int32)
    return lambda tile: _bound(
        lambda a, b, g: grouped.grouped_fp8_gemm_k(a, b, g, num_groups=groups, tile=tile), a, b, lists
    )


def seconds_a_call(call: Call, tile: Tile) -> float:
    """Median time of a call whose operands are not in L2, less that of an empty one; waits for each."""
    run, flush = call(tile), jax.jit(lambda x: x + 1)
    scratch = flush(jnp.zeros(FLUSH_BYTES // 4, jnp.float32))
    run().block_until_ready()

    def timed(first: Callable[[], Any]) -> float:
        nonlocal scratch
        spans = []
        for _ in range(CALLS):
            scratch = flush(scratch).block_until_ready()
            start = time.perf_counter()
            first().block_until_ready()
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)

    nothing = jax.jit(lambda x: x + 1)
    one = nothing(jnp.zeros(1))
    return timed(run) - timed(lambda: nothing(one))


def _bound(function: Callable[..., jax.Array], *args: Any) -> Callable[[], jax.Array]:
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def _operand(shape: tuple[int, ...], rows: int) -> QTensor:
    """Random E4M3 numbers and scales: speed depends on how many bits toggle, so not zeros."""
    key_values, key_scales = jax.random.split(jax.random.key(sum(shape)))
    *lead, R, K = shape
    values = jax.random.normal(key_values, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)
    scales = jax.random.uniform(key_scales, (*lead, -(-R // rows), K // 128), jnp.float32, 0.5, 1.5)
    return QTensor(values, scales)
