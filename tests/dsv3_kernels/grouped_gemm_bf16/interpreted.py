"""Runs the grouped bf16 GEMM kernels in Pallas's interpreter of a GPU: prints the seed, then one JSON object a case.

A program of its own: an interpreted kernel that is wrong can hang, and its process has to be ended from outside.

    python interpreted.py [--seed N] CASE...
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.grouped_gemm_bf16 import pallas_sm90, reference
from dsv3_kernels.sm90.tile import Tile

Result = tuple[jax.Array, jax.Array]
Case = Callable[[np.random.Generator], Result]

SMALL, SHORT = Tile(128, 128, 2), Tile(64, 128, 2)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def params() -> Any:
    return plgpu.InterpretGPUParams(detect_races=True)


def of_rows(
    ids: list[int],
    inner: int,
    outer: int,
    tile: Tile = SMALL,
    *,
    transposed: bool = False,
    block: int = 64,
    dtype: Any = jnp.bfloat16,
    sms: int = 2,
) -> Case:
    """Blocks that no group claims hold NaN."""

    def run(rng: np.random.Generator) -> Result:
        groups = jnp.asarray(ids, jnp.int32)
        rows = normal(rng, block * len(ids), inner)
        rows = jnp.where(jnp.repeat(groups, block)[:, None] < 0, jnp.bfloat16(jnp.nan), rows)
        shape = (outer, inner) if transposed else (inner, outer)
        args = (rows, normal(rng, max(ids) + 2, *shape), groups)
        options = {"transposed": transposed, "out_dtype": dtype}
        out = pallas_sm90.grouped_matmul(*args, **options, tile=tile, num_sms=sms, interpret=params())
        return out, reference.grouped_matmul(*args, **options)

    return run


def of_contraction(
    ids: list[int],
    num_groups: int,
    width: int,
    outer: int,
    tile: Tile = SMALL,
    *,
    block: int = 64,
    dtype: Any = jnp.float32,
    sms: int = 2,
) -> Case:
    """Blocks that no group claims hold NaN."""

    def run(rng: np.random.Generator) -> Result:
        groups = jnp.asarray(ids, jnp.int32)
        is_skipped = jnp.repeat(groups, block)[:, None] < 0
        a, b = (
            jnp.where(is_skipped, jnp.bfloat16(jnp.nan), normal(rng, block * len(ids), size)) for size in (width, outer)
        )
        options = {"num_groups": num_groups, "out_dtype": dtype}
        out = pallas_sm90.grouped_matmul_k(a, b, groups, **options, tile=tile, num_sms=sms, interpret=params())
        return out, reference.grouped_matmul_k(a, b, groups, **options)

    return run


def of_random_rows(rng: np.random.Generator) -> Result:
    """Blocks, sizes and direction from the seed."""
    ids = [int(group) for group in rng.integers(-1, 3, rng.integers(1, 5))]
    inner, outer = (int(size) for size in rng.integers(1, 200, 2))
    tile = SMALL if rng.integers(2) else SHORT
    return of_rows(ids, inner, outer, tile, transposed=bool(rng.integers(2)), sms=int(rng.integers(1, 4)))(rng)


def of_random_contraction(rng: np.random.Generator) -> Result:
    """Blocks and sizes from the seed."""
    ids = [int(group) for group in np.repeat(rng.permutation(4) - 1, rng.integers(0, 3, 4))] or [0]
    width, outer = (int(size) for size in rng.integers(1, 200, 2))
    return of_contraction(ids, 3, width, outer, sms=int(rng.integers(1, 4)))(rng)


CASES: dict[str, Case] = {
    "rows of random sizes": of_random_rows,
    "weights of random sizes": of_random_contraction,
    "odd runs, more tiles than blocks": of_rows([1, 1, 1, -1, 0], 128, 192, sms=1),
    "input gradient": of_rows([0, 2, 2], 192, 72, transposed=True),
    "few rows": of_rows([1, -1], 64, 192, SHORT),
    "weight gradient, an empty group": of_contraction([1, 1, -1, 0], 3, 72, 128),
    # The slow ones
    "few rows, input gradient": of_rows([1, 0], 128, 128, SHORT, transposed=True),
    "blocks of 128 rows, whole width": of_rows([1, 0, 0], 64, 256, Tile(128, 256, 2), block=128, dtype=jnp.float32),
    "all blocks skipped": of_rows([-1, -1, -1], 64, 64),
    "weight gradient in bfloat16": of_contraction([0, 1], 2, 200, 256, Tile(128, 256, 3), dtype=jnp.bfloat16),
    "weight gradient, blocks of 128 rows": of_contraction([2, 0], 3, 64, 64, block=128, sms=1),
}
NUM_FAST = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("names", nargs="*", default=list(CASES))
    given = parser.parse_args()
    print(json.dumps({"seed": given.seed}), flush=True)
    for name in given.names:
        out, want = CASES[name](np.random.default_rng(given.seed))
        scale = max(float(jnp.abs(want.astype(jnp.float32)).max()), 1e-30)
        error = jnp.abs(out.astype(jnp.float32) - want.astype(jnp.float32))
        report = {
            "name": name,
            "seed": given.seed,
            "agree": out.shape == want.shape and out.dtype == want.dtype,
            "error": float(error.max()) / scale,
            "bound": 2**-8 if out.dtype == jnp.bfloat16 else 1e-6,
            "races": interpret_pallas_call.get_races().races_found,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
