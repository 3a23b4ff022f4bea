"""What this device reaches in a large matrix product: the yardstick of model-FLOPs utilisation."""

import time

import jax
import jax.numpy as jnp

from dsv3_jax.typing import DType


def measure_matmul_peak(dtype: DType, *, size: int | None = None, repeats: int = 4) -> float:
    """Operations a second of a square product in `dtype` on the default device, best of `repeats`.

    `size` defaults to 1536 on a CPU (a tenth of a second a product on two cores) and 8192 elsewhere.
    """
    side = size or (1536 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: jnp.einsum("mk,kn->mn", a, b))
    product(x, x).block_until_ready()
    best = min(_seconds(product, x) for _ in range(repeats))
    return 2.0 * side**3 / best


def _seconds(product, x) -> float:
    start = time.perf_counter()
    product(x, x).block_until_ready()
    return time.perf_counter() - start
