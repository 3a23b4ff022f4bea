"""Compares Hopper casts with their references in Pallas' interpreter, bit for bit.

`python interpreted.py OPS DTYPES SCALES`, each a list with commas. A program of its own, because a failed callback of
the interpreter can wait for ever.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.casts import pallas_sm90, pallas_sm90_transpose, reference

SHAPES = {
    "cast_tokens": (3, 1024),
    "swiglu_cast": (2, 2048),
    "cast_blocks": (128, 256),
    "requantize_transposed": (256, 128),
}


def main(op: str, dtype: str, scale: str) -> None:
    rng = np.random.default_rng()
    x = rng.normal(size=SHAPES[op]) * 2.0 ** rng.integers(-6, 6, size=(SHAPES[op][0], 1))
    x[0] = 0
    x[1, 0] = 1e30
    x = jnp.asarray(x.astype(dtype))
    value = reference.cast_tokens(x, scale=scale) if op == "requantize_transposed" else x
    module = pallas_sm90_transpose if op == "requantize_transposed" else pallas_sm90
    actual = getattr(module, op)(value, scale=scale, interpret=plgpu.InterpretGPUParams())
    expected = getattr(reference, op)(value, scale=scale)
    for part, ours, theirs in zip(actual._fields, actual, expected):
        assert ours.shape == theirs.shape, (part, ours.shape, theirs.shape)
        wrong = np.ascontiguousarray(ours).view(np.uint8) != np.ascontiguousarray(theirs).view(np.uint8)
        assert not wrong.any(), f"{wrong.sum()} bytes of the {part} differ"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for arguments in zip(*(argument.split(",") for argument in sys.argv[1:])):
        main(*arguments)
    print("the same bits")
