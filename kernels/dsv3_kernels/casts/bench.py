"""What the casts are compared with on a GPU: XLA's bits, XLA's speed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_kernels.casts import api, reference
from dsv3_kernels.casts.cases import REAL, UGLY, Case
from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison, different_bits
from dsv3_kernels.quantize import QTensor

Inputs = Array | QTensor

ONE_LOAD = Case("cast_tokens", 8, 128)
"""What one warpgroup takes at least."""


def bench_cases() -> list[BenchCase]:
    """Every real shape; GB/s are what counts, as nothing is multiplied."""
    return [
        BenchCase(
            op=case.op,
            name=_name(case),
            make_inputs=functools.partial(make_inputs, case),
            kernel=functools.partial(_run, case, "float32", implementation="pallas"),
            others={"XLA": functools.partial(_run, case, "float32", implementation="xla")},
            flops=0.0,
            num_bytes=num_bytes(case),
            is_quick=case in REAL[:1],
        )
        for case in REAL
    ]


def check_cases() -> list[CheckCase]:
    """Ugly shapes have NumPy's bits, real ones those of XLA on this device."""
    return [
        CheckCase(
            op=case.op,
            name=f"{_name(case)}_{scale}",
            make_inputs=functools.partial(make_inputs, case),
            run=functools.partial(_run, case, scale),
            comparisons=(_comparison(case, scale),),
            is_small=case not in REAL,
            is_plain=_is_plain(case),
            path="FP8 conversion" if (case, scale) == (ONE_LOAD, "float32") else "",
        )
        for case in (ONE_LOAD, *UGLY, *REAL)
        for scale in _scales(case)
    ]


def make_inputs(case: Case, key: jax.Array) -> Inputs:
    """Normal values; the rows of every eighth token are 2^-12 of the others'."""
    x = jax.random.normal(key, (case.rows, case.columns), case.dtype)
    small = jnp.where(jnp.arange(case.rows) % 8 == 7, jnp.asarray(2.0**-12, x.dtype), jnp.asarray(1, x.dtype))
    x = x * small[:, None]
    return reference.cast_tokens(x, scale="float32") if case.op == "requantize_transposed" else x


def num_bytes(case: Case) -> int:
    """The input read once, values and scales written once."""
    size = case.rows * case.columns
    if case.op == "requantize_transposed":
        return 2 * (size + size // 128 * 4)
    outputs = size // 2 if case.op == "swiglu_cast" else size
    tile = 128 * 128 if case.op == "cast_blocks" else 128
    return size * jnp.dtype(case.dtype).itemsize + outputs + outputs // tile * 4


def largest_step(x: QTensor, y: QTensor) -> Array:
    """How many values of E4M3 apart two casts are at most; infinity where scales differ by more than 1e-6."""
    steps = jnp.abs(x.values.view(jnp.uint8).astype(jnp.int32) - y.values.view(jnp.uint8).astype(jnp.int32)).max()
    is_near = (jnp.abs(x.scales / y.scales - 1) < 1e-6).all()
    return jnp.where(is_near, steps.astype(jnp.float32), jnp.float32(jnp.inf))


def _run(case: Case, scale: str, inputs: Inputs, implementation: str) -> QTensor:
    return getattr(api, case.op)(inputs, scale=scale, implementation=implementation)


def _name(case: Case) -> str:
    return f"{case.rows}x{case.columns}_{case.dtype}"


def _scales(case: Case) -> tuple[str, ...]:
    """An exponential function that is one bit off may double a power of two."""
    return ("float32",) if case.op == "swiglu_cast" else ("float32", "ue8m0")


def _is_plain(case: Case) -> bool:
    """Kernels take blocks of 128x128; of tokens eight tiles of 1x128, which SwiGLU wants of one token."""
    if case.op in ("cast_blocks", "requantize_transposed"):
        return case.rows % 128 > 0 or case.columns % 128 > 0
    size = case.columns // 2 if case.op == "swiglu_cast" else case.rows * case.columns
    return case.columns % 128 > 0 or size % 1024 > 0


def _comparison(case: Case, scale: str) -> Comparison:
    if case in REAL:
        expected = jax.jit(functools.partial(_run, case, scale, implementation="xla"))
    else:
        expected = functools.partial(_with_numpy, case, scale)
    if case.op == "swiglu_cast":
        return Comparison("steps", expected, largest_step, 1.5)
    return Comparison("bits", expected, different_bits, 0.0)


def _with_numpy(case: Case, scale: str, inputs: Inputs) -> QTensor:
    return getattr(reference, case.op)(jax.tree.map(np.asarray, inputs), scale=scale)
