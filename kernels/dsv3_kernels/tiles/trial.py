"""The choice among tiles on this machine's GPU: each multiplies the same operands, and the fastest right one wins."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_kernels.gpu.case import diff, worst
from dsv3_kernels.gpu.timing import num_input_sets
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.sm90.tile import BLOCK_K, Tile
from dsv3_kernels.tiles.model import Problem

MOST_DIFFERENCE, MOST_ERROR = 1e-5, 1.0
"""Of `gpu.case.diff` and `gpu.case.worst` from the plain matmul of the same operands, as in `dsv3_kernels.check`."""
CONTIGUOUS_GROUPS = 8

Seconds = Callable[[Callable[[Any], Any], Sequence[Any]], float]
"""A function of inputs and its sets of inputs -> seconds of a launch."""


class Trial(NamedTuple):
    """A matmul to be computed with one tile after the other."""

    sets: list[Any]
    """Operands, as many as make the L2 cache forget each before it comes round again."""
    kernel: Callable[..., jax.Array]
    """kernel(inputs, tile=tile)."""
    plain: Callable[[Any], jax.Array]
    """The XLA implementation of the same matmul."""


def make_trial(kind: str, problem: Problem) -> Trial:
    """Random operands of the problem: speed depends on how many bits toggle, so not zeros. Groups are of one size."""
    from dsv3_kernels.gemm import pallas_sm90 as gemm
    from dsv3_kernels.gemm import xla as gemm_xla
    from dsv3_kernels.grouped_gemm import pallas_sm90 as grouped
    from dsv3_kernels.grouped_gemm import xla as grouped_xla

    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    dtype = problem.out_dtype
    if kind == "dense":
        b_rows = 1 if problem.is_b_scaled_by_row else BLOCK_K
        return Trial(
            _sets((m, k), (n, k), b_rows),
            lambda x, tile: gemm.fp8_gemm(*x, out_dtype=dtype, tile=tile),
            lambda x: gemm_xla.fp8_gemm(*x, out_dtype=dtype),
        )
    if kind == "contiguous":
        ids = np.arange(m // BLOCK_K, dtype=np.int32) * CONTIGUOUS_GROUPS // (m // BLOCK_K)
        return Trial(
            _sets((m, k), (CONTIGUOUS_GROUPS, n, k), BLOCK_K, ids),
            lambda x, tile: grouped.grouped_fp8_gemm(*x, out_dtype=dtype, tile=tile),
            lambda x: grouped_xla.grouped_fp8_gemm(*x, out_dtype=dtype),
        )
    if kind == "masked":
        return Trial(
            _sets((groups, m, k), (groups, n, k), BLOCK_K, np.full(groups, m, np.int32)),
            lambda x, tile: grouped.grouped_fp8_gemm_masked(*x, out_dtype=dtype, tile=tile),
            lambda x: grouped_xla.grouped_fp8_gemm_masked(*x, out_dtype=dtype),
        )
    ids = np.repeat(np.arange(groups, dtype=np.int32), k // BLOCK_K)
    return Trial(
        _sets((m, k * groups), (n, k * groups), 1, ids),
        lambda x, tile: grouped.grouped_fp8_gemm_k(*x, num_groups=groups, tile=tile),
        lambda x: grouped_xla.grouped_fp8_gemm_k(*x, num_groups=groups),
    )


def fastest(trial: Trial, tiles: Sequence[Tile], seconds: Seconds) -> tuple[Tile, float]:
    """The fastest of the tiles whose result is right, and its time; the others are named on stderr.

    Raises: RuntimeError if no tile gives the right result.
    """
    inputs = trial.sets[0]
    expected = jax.jit(trial.plain)(inputs)
    timed: list[tuple[float, Tile]] = []
    for tile in tiles:
        run = functools.partial(trial.kernel, tile=tile)
        try:
            out = jax.jit(run)(inputs)
            errors = float(jax.jit(diff)(out, expected)), float(jax.jit(worst)(out, expected))
            if not (errors[0] < MOST_DIFFERENCE and errors[1] < MOST_ERROR):
                print(f"tile {tile.name} is wrong: diff {errors[0]:.2g}, worst {errors[1]:.2g}", file=sys.stderr)
                continue
            timed.append((seconds(run, trial.sets), tile))
        except jax.errors.JaxRuntimeError as error:
            print(f"tile {tile.name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
    if not timed:
        raise RuntimeError(
            f"none of {[tile.name for tile in tiles]} gives the right result; see python -m dsv3_kernels.check."
        )
    best, tile = min(timed, key=lambda pair: pair[0])
    return tile, best


def _sets(a_shape: tuple[int, ...], b_shape: tuple[int, ...], b_rows: int, *lists: np.ndarray) -> list[Any]:
    count = num_input_sets(float(np.prod(a_shape, dtype=float) + np.prod(b_shape, dtype=float)))
    make = jax.jit(lambda key: (_operand(key, a_shape, 1), _operand(jax.random.fold_in(key, 1), b_shape, b_rows)))
    return [(*make(key), *map(jnp.asarray, lists)) for key in jax.random.split(jax.random.key(0), count)]


def _operand(key: jax.Array, shape: tuple[int, ...], rows: int) -> QTensor:
    *lead, R, K = shape
    values = jax.random.normal(key, shape, jnp.bfloat16).astype(jnp.float8_e4m3fn)
    sizes = (*lead, -(-R // rows), -(-K // BLOCK_K))
    return QTensor(values, jax.random.uniform(jax.random.fold_in(key, 2), sizes, jnp.float32, 0.5, 1.5))
