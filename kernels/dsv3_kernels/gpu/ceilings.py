"""What this machine reaches at best: bytes copied a second, and matmuls of large matrices in bf16 and FP8."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.gemm.cases import normal
from dsv3_kernels.quantize import E4M3

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192

Measure = Callable[[Callable[[Any], Any], Sequence[Any]], float]
"""A function of inputs and its sets of inputs -> seconds of one launch."""


class Ceilings(NamedTuple):
    """Rates in units a second; a matmul counts 2 M N K."""

    copy_bytes: float
    bf16_flops: float
    fp8_flops: float

    def share(self, seconds: float, flops: float, num_bytes: float, *, is_bf16: bool = False) -> tuple[float, str]:
        """Share of the ceiling that `seconds` reach, and which one binds: "memory" or "compute"."""
        memory, compute = self.bounds(flops, num_bytes, is_bf16=is_bf16)
        return max(memory, compute) / seconds, "memory" if memory > compute else "compute"

    def bounds(self, flops: float, num_bytes: float, *, is_bf16: bool = False) -> tuple[float, float]:
        """Seconds that the bytes and the matmuls need at least."""
        rate = self.bf16_flops if is_bf16 else max(self.fp8_flops, self.bf16_flops)
        return num_bytes / self.copy_bytes, flops / rate


def measure_ceilings(measure: Measure, *, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE) -> Ceilings:
    """Measures them with the clock of the rows."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jnp.zeros(copy_bytes // 4, jnp.float32), jnp.ones(copy_bytes // 4, jnp.float32)]
    copy = measure(lambda x: -x, arrays)
    pairs = [(normal(keys[i], (size, size)), normal(keys[i + 1], (size, size))) for i in (0, 2)]
    bf16 = measure(lambda pair: bf16_product(*pair), pairs)
    fp8 = measure(lambda pair: fp8_product(*pair), [(a.astype(E4M3), b.astype(E4M3)) for a, b in pairs])
    flops = 2.0 * size**3
    return Ceilings(2.0 * 4 * (copy_bytes // 4) / copy, flops / bf16, flops / fp8)


def bf16_product(a: Array, b: Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Array:
    """a [..., M, K] · b [..., N, K]ᵀ by XLA, which adds up in float32 and rounds to `out_dtype` within its kernel."""
    return jnp.einsum("...mk,...nk->...mn", a, b, preferred_element_type=out_dtype)


def fp8_product(a: Array, b: Array, out_dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Array:
    """a · bᵀ of E4M3 without scales by XLA, which has cuBLASLt's FP8 matmul to choose.

    A scale for each whole operand would ride along in the same kernel.
    """
    return jnp.einsum("...mk,...nk->...mn", a, b, preferred_element_type=out_dtype)
