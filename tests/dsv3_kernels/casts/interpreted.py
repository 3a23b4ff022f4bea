"""Compares Hopper casts with their references in Pallas' interpreter, bit for bit, at random shapes.

`python interpreted.py OPS DTYPES SCALES SMS`, each a list with commas (0 multiprocessors for all), `--seed N` for the
shapes and inputs of an earlier run. Prints the seed, then one JSON object a case. A program of its own, because a
failed callback of the interpreter can wait for ever.
"""

import argparse
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.casts import pallas_sm90, pallas_sm90_transpose, reference


def shape_of(op: str, rng: np.random.Generator) -> tuple[int, int]:
    """What the kernel takes: blocks of 128x128, or tokens of eight tiles of 1x128 (SwiGLU: each, gate and up)."""
    rows, blocks, tiles = int(rng.integers(2, 6)), rng.integers(1, 3, 2), int(rng.integers(1, 3))
    if op in ("cast_blocks", "requantize_transposed"):
        return 128 * int(blocks[0]), 128 * int(blocks[1])
    if op == "swiglu_cast":
        return rows, 2 * 1024 * tiles
    return rows, 128 * tiles * (8 // math.gcd(rows, 8))


def main(op: str, dtype: str, scale: str, num_sms: int | None, seed: int) -> None:
    rng = np.random.default_rng([seed, *op.encode()])
    shape = shape_of(op, rng)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-6, 6, size=(shape[0], 1))
    x[0] = 0
    x[1, 0] = 1e30
    x = jnp.asarray(x.astype(dtype))
    value = reference.cast_tokens(x, scale=scale) if op == "requantize_transposed" else x
    module = pallas_sm90_transpose if op == "requantize_transposed" else pallas_sm90
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    actual = getattr(module, op)(value, scale=scale, num_sms=num_sms, interpret=interpret)
    expected = getattr(reference, op)(value, scale=scale)
    wrong = {}
    for part, ours, theirs in zip(actual._fields, actual, expected):
        assert ours.shape == theirs.shape, (part, ours.shape, theirs.shape)
        different = np.ascontiguousarray(ours).view(np.uint8) != np.ascontiguousarray(theirs).view(np.uint8)
        wrong[part] = int(different.sum())
    case = {"op": op, "dtype": dtype, "scale": scale, "sms": num_sms, "shape": shape}
    report = case | {"wrong_bytes": wrong, "races": interpret_pallas_call.get_races().races_found, "seed": seed}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser()
    for name in ("ops", "dtypes", "scales", "sms"):
        parser.add_argument(name, type=lambda text: text.split(","))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    given = parser.parse_args()
    print(json.dumps({"seed": given.seed}), flush=True)
    for *case, sms in zip(given.ops, given.dtypes, given.scales, given.sms, strict=True):
        main(*case, int(sms) or None, given.seed)
