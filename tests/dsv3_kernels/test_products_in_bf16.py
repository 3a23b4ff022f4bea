"""The FP8 matmuls as GPUs without the kernels run them: their values, what is skipped, and how they multiply."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import dsv3_kernels as kernels
from dsv3_kernels import QTensor, quantize_tiles
from dsv3_kernels.gemm import reference, xla
from dsv3_kernels.grouped_gemm import reference as grouped_reference
from dsv3_kernels.grouped_gemm import xla as grouped
from tests.dsv3_kernels.errors import calc_diff


def operand(rng: np.random.Generator, *shape: int, rows: int = 1) -> QTensor:
    """Rows differ in size by factors up to 2^8."""
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-4, 4, (*shape[:-1], 1))
    return jax.tree.map(jnp.asarray, quantize_tiles(x.astype(ml_dtypes.bfloat16), tile=(rows, 128)))


def spoilt(q: QTensor, rows: np.ndarray) -> QTensor:
    """NaN in the rows that are marked."""
    return q._replace(scales=jnp.where(rows[..., None], jnp.nan, q.scales))


def ids(*numbers: int) -> jax.Array:
    return jnp.asarray(numbers, jnp.int32)


def dense(rng, *, row_tile: int, out_dtype, summed: bool = False):
    M, N, K = (int(rng.choice(sizes)) for sizes in ((1, 97, 130), (1, 33, 257), (5, 128, 300, 1025)))
    sums = jnp.asarray(rng.standard_normal((M, N)), jnp.float32) if summed else None
    names = {"out_dtype": out_dtype, "accumulate_into": sums}
    return (operand(rng, M, K), operand(rng, N, K, rows=row_tile)), names


def contiguous(rng):
    N, K = int(rng.choice((1, 97, 200))), int(rng.choice((5, 128, 300)))
    groups = rng.integers(-1, 3, 4)
    a = spoilt(operand(rng, 512, K), np.repeat(groups < 0, 128))
    return (a, operand(rng, 3, N, K, rows=128), ids(*groups)), {"out_dtype": jnp.bfloat16}


def masked(rng):
    M, N, K = (int(rng.choice(sizes)) for sizes in ((1, 40, 129), (1, 97, 200), (5, 128, 300)))
    counts = rng.integers(0, M + 1, 3)
    a = spoilt(operand(rng, 3, M, K), np.arange(M) >= counts[:, None])
    return (a, operand(rng, 3, N, K, rows=128), ids(*counts)), {"out_dtype": jnp.float32}


def contraction(rng, *, summed: bool):
    M, N = int(rng.choice((1, 97, 130))), int(rng.choice((1, 33, 257)))
    groups = ids(*np.sort(rng.integers(-1, 4, 5)))
    sums = jnp.asarray(rng.standard_normal((4, M, N)), jnp.float32) if summed else None
    a, b = operand(rng, M, 640), operand(rng, N, 640)
    a = a._replace(scales=jnp.where(groups < 0, jnp.nan, a.scales))
    return (a, b, groups), {"num_groups": 4, "accumulate_into": sums}


DENSE = (reference.fp8_gemm, xla.fp8_gemm_in_bf16)
CONTRACTION = (grouped_reference.grouped_fp8_gemm_k, grouped.grouped_fp8_gemm_k_in_bf16)
PRODUCTS = {
    "weights in blocks": (*DENSE, functools.partial(dense, row_tile=128, out_dtype=jnp.bfloat16)),
    "weights in rows": (*DENSE, functools.partial(dense, row_tile=1, out_dtype=jnp.float32)),
    "added": (*DENSE, functools.partial(dense, row_tile=1, out_dtype=jnp.float32, summed=True)),
    "contiguous": (grouped_reference.grouped_fp8_gemm, grouped.grouped_fp8_gemm_in_bf16, contiguous),
    "masked": (grouped_reference.grouped_fp8_gemm_masked, grouped.grouped_fp8_gemm_masked_in_bf16, masked),
    "contraction": (*CONTRACTION, functools.partial(contraction, summed=False)),
    "contraction added": (*CONTRACTION, functools.partial(contraction, summed=True)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_the_reference(name, rng):
    exact, product, draw = PRODUCTS[name]
    arrays, names = draw(rng)
    found, expected = (jax.jit(functools.partial(form, **names))(*arrays) for form in (product, exact))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # Two orders of additions may round to neighbours in bfloat16.
    limit = 1e-6 if found.dtype == jnp.bfloat16 else 1e-10
    assert calc_diff(found, expected) < limit, jax.tree.map(jnp.shape, arrays)


def numbers(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.int32)


def shaped(*shape: int, rows: int = 1) -> QTensor:
    scales = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // 128))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(scales, jnp.float32))


M = N = K = 1024
OPS = {
    kernels.fp8_gemm: (shaped(M, K), shaped(N, K, rows=128)),
    kernels.grouped_fp8_gemm: (shaped(M, K), shaped(4, N, K, rows=128), numbers(8)),
    kernels.grouped_fp8_gemm_masked: (shaped(4, M, K), shaped(4, N, K, rows=128), numbers(4)),
    functools.partial(kernels.grouped_fp8_gemm_k, num_groups=4): (shaped(M, K), shaped(N, K), numbers(8)),
}
DOT = r"dot_general.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>"


@pytest.mark.parametrize("op", OPS)
def test_gpus_without_the_kernels_multiply_in_bfloat16_in_the_memory_of_the_operands(op):
    """A matmul of all blocks of the contraction at once would take 8 M N."""
    traced = jax.jit(functools.partial(op, implementation="xla")).trace(*OPS[op])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(DOT, text) == [("bf16", "bf16", "f32")]
    assert not re.search(r"stablehlo\.(case|if)", text), "the host would wait for data"
    sizes = {math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)x\w+>", text)}
    assert max(sizes) <= 4 * M * N
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert set(re.findall(DOT, on_cpu)) == {("f32", "f32", "f32")}
