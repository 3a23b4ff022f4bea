"""What this device reaches in a large matmul: the yardstick of model-FLOPs utilisation."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, DType


def measure_matmul_peak(dtype: DType, *, size: int | None = None, repeats: int = 4) -> float:
    """Operations a second of a square matmul in `dtype` on the default device, best of `repeats`.

    `size` defaults to 1536 on a CPU (a tenth of a second each on two cores) and 8192 elsewhere, where eight
    matmuls wait in line, so that the host's calls are hidden. The elements are random: a GPU's clock is higher while
    it multiplies ones.
    """
    is_cpu = jax.default_backend() == "cpu"
    side, count = size or (1536 if is_cpu else 8192), 1 if is_cpu else 8
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a, b: jnp.einsum("mk,kn->mn", a, b))
    product(x, x).block_until_ready()
    best = min(_seconds(product, x, count) for _ in range(repeats))
    return 2.0 * side**3 * count / best


def _seconds(product: Callable[[Array, Array], Array], x: Array, count: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready([product(x, x) for _ in range(count)])
    return time.perf_counter() - start
