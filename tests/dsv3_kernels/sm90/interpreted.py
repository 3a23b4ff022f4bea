"""Runs FP8 GEMM kernels in Pallas's interpreter of a GPU, and prints one JSON object a case.

`python interpreted.py CASE ...`, with `--seed N` for the values and drawn shapes of an earlier run. A program of its
own: an interpreted kernel that is wrong can hang, and its process has to be ended from outside.
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

from dsv3_kernels.gemm import pallas_sm90 as gemm
from dsv3_kernels.gemm import reference
from dsv3_kernels.grouped_gemm import pallas_sm90 as grouped
from dsv3_kernels.grouped_gemm import reference as grouped_reference
from dsv3_kernels.quantize import QTensor, quantize_tiles
from dsv3_kernels.sm90.tile import Tile

Rng = np.random.Generator
Result = tuple[jax.Array, jax.Array]


def normal(rng: Rng, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def params() -> Any:
    return plgpu.InterpretGPUParams(detect_races=True)


def dense(
    rng: Rng, m: int, n: int, k: int, tile: Tile, *, by_row: bool = False, adds: bool = False, sms: int = 2
) -> Result:
    a = quantize_tiles(normal(rng, m, k), tile=(1, 128))
    b = quantize_tiles(normal(rng, n, k), tile=(1 if by_row else 128, 128))
    options = {
        "out_dtype": jnp.float32 if by_row else jnp.bfloat16,
        "accumulate_into": normal(rng, m, n) if adds else None,
    }
    out = gemm.fp8_gemm(a, b, **options, tile=tile, num_sms=sms, interpret=params())
    return out, reference.fp8_gemm(a, b, **options)


def contiguous(rng: Rng, groups: list[int], n: int, k: int, tile: Tile, sms: int = 2) -> Result:
    a = quantize_tiles(normal(rng, 128 * len(groups), k), tile=(1, 128))
    b = quantize_tiles(normal(rng, max(groups) + 1, n, k), tile=(128, 128))
    args = (a, b, jnp.asarray(groups, jnp.int32))
    out = grouped.grouped_fp8_gemm(*args, out_dtype=jnp.bfloat16, tile=tile, num_sms=sms, interpret=params())
    return out, grouped_reference.grouped_fp8_gemm(*args, out_dtype=jnp.bfloat16)


def masked(rng: Rng, valid: list[int], m: int, n: int, k: int, tile: Tile, sms: int = 2) -> Result:
    """Rows that do not count have NaN scales."""
    a = quantize_tiles(normal(rng, len(valid), m, k), tile=(1, 128))
    b = quantize_tiles(normal(rng, len(valid), n, k), tile=(128, 128))
    lists = jnp.asarray(valid, jnp.int32)
    want = grouped_reference.grouped_fp8_gemm_masked(a, b, lists, out_dtype=jnp.bfloat16)
    counts = jnp.arange(m)[None, :, None] < lists[:, None, None]
    a = QTensor(a.values, jnp.where(counts, a.scales, jnp.nan))
    options = {"out_dtype": jnp.bfloat16, "tile": tile, "num_sms": sms, "interpret": params()}
    return grouped.grouped_fp8_gemm_masked(a, b, lists, **options), want


def contraction(
    rng: Rng, groups: list[int], total: int, m: int, n: int, tile: Tile, *, adds: bool, sms: int = 2
) -> Result:
    k = 128 * len(groups)
    a, b = quantize_tiles(normal(rng, m, k), tile=(1, 128)), quantize_tiles(normal(rng, n, k), tile=(1, 128))
    args = (a, b, jnp.asarray(groups, jnp.int32))
    options = {"num_groups": total, "accumulate_into": normal(rng, total, m, n) if adds else None}
    out = grouped.grouped_fp8_gemm_k(*args, **options, tile=tile, num_sms=sms, interpret=params())
    return out, grouped_reference.grouped_fp8_gemm_k(*args, **options)


def drawn(rng: Rng) -> Result:
    """Any small shape, with any scales of b and any parts of the contraction."""
    m, n, k = (int(rng.integers(1, most)) for most in (160, 200, 900))
    tile = Tile(int(rng.choice([64, 128])), 64, int(rng.integers(2, 6)), split_k=int(rng.choice([1, 2, 4])))
    return dense(rng, m, n, k, tile, by_row=bool(rng.integers(2)), sms=4)


CASES: dict[str, Callable[[Rng], Result]] = {
    "few rows, split contraction": lambda rng: dense(rng, 97, 64, 1024, Tile(64, 64, 2, split_k=2)),
    "drawn": drawn,
    # The slow ones
    "skipped blocks": lambda rng: contiguous(rng, [1, -1, 0], 136, 256, Tile(128, 64, 2, "n")),
    "empty groups of the contraction, added": lambda rng: contraction(
        rng, [1, 1, 3, -1], 4, 97, 64, Tile(128, 64, 2), adds=True
    ),
    "more tiles than blocks": lambda rng: dense(rng, 136, 192, 512, Tile(128, 64, 2), sms=1),
    "two waves, multicast of a": lambda rng: dense(rng, 256, 256, 256, Tile(256, 128, 2, "n")),
    "weight gradient, multicast of b, added": lambda rng: dense(
        rng, 250, 130, 256, Tile(128, 64, 3, "m"), by_row=True, adds=True
    ),
    "empty and partial groups": lambda rng: masked(rng, [0, 70, 1], 136, 64, 128, Tile(128, 64, 2)),
    "one row": lambda rng: dense(rng, 1, 192, 256, Tile(64, 128, 4)),
    "ragged contraction": lambda rng: dense(rng, 65, 64, 200, Tile(64, 64, 2)),
    "ragged contraction of groups": lambda rng: contiguous(rng, [1, 0], 64, 72, Tile(128, 64, 2)),
    "a row past the last tile": lambda rng: dense(rng, 1025, 64, 128, Tile(256, 64, 2), sms=2),
    "three scales in a tile": lambda rng: dense(rng, 64, 528, 256, Tile(128, 176, 2)),
    "odd cluster": lambda rng: dense(rng, 128, 192, 256, Tile(128, 64, 2, "n")),
    "half a block of the contraction": lambda rng: dense(rng, 64, 64, 320, Tile(64, 64, 2)),
    "parts that begin within a panel, added": lambda rng: dense(
        rng, 70, 64, 1500, Tile(64, 64, 3, split_k=4), by_row=True, adds=True, sms=4
    ),
    "split contraction with empty parts": lambda rng: dense(rng, 64, 64, 640, Tile(64, 64, 2, split_k=4), sms=4),
    "weight gradient": lambda rng: dense(rng, 130, 97, 384, Tile(128, 160, 2), by_row=True),
    "one group": lambda rng: contiguous(rng, [0], 64, 128, Tile(128, 64, 2)),
    "all blocks skipped": lambda rng: contiguous(rng, [0, -1], 64, 128, Tile(128, 64, 2), sms=1),
    "all groups empty": lambda rng: masked(rng, [0, 0], 64, 64, 128, Tile(64, 64, 2)),
    "full groups": lambda rng: masked(rng, [130, 130], 130, 200, 256, Tile(128, 160, 2, "n"), sms=4),
    "many ids of the contraction": lambda rng: contraction(
        rng, [2, 2, -1, 0, 0, 0, -1, 4, 4, 3], 5, 64, 64, Tile(64, 64, 2), adds=False
    ),
    "groups of the contraction": lambda rng: contraction(rng, [0, 1], 2, 64, 136, Tile(128, 96, 2, "m"), adds=False),
}
NUM_FAST = 2


def main(names: list[str], seed: int) -> None:
    for name in names:
        out, want = CASES[name](np.random.default_rng([seed, *name.encode()]))
        scale = max(float(jnp.abs(want.astype(jnp.float32)).max()), 1e-30)
        error = jnp.abs(out.astype(jnp.float32) - want.astype(jnp.float32))
        report = {
            "name": name,
            "agree": out.shape == want.shape and out.dtype == want.dtype,
            "error": float(error.max()) / scale,
            "bound": 2**-8 if out.dtype == jnp.bfloat16 else 1e-6,
            "races": interpret_pallas_call.get_races().races_found,
            "seed": seed,
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=list(CASES))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    given = parser.parse_args()
    main(given.names, given.seed)
