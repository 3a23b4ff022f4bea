"""The kernels can be called inside `jax.shard_map`, which checks over which axes of a mesh a value varies."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import dispatch
from dsv3_kernels.quantize import QTensor

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

from dsv3_kernels.gemm import pallas_sm90 as gemm
from dsv3_kernels.grouped_gemm import pallas_sm90 as grouped

P = jax.sharding.PartitionSpec
ROWS, ALL = P("data"), P()


def operand(*shape: int, rows: int = 1) -> QTensor:
    *lead, R, K = shape
    scales = (*lead, -(-R // rows), -(-K // 128))
    return QTensor(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), jax.ShapeDtypeStruct(scales, jnp.float32))


def add(a: QTensor, b: QTensor, sums: jax.Array) -> jax.Array:
    return gemm.fp8_gemm(a, b, out_dtype=jnp.float32, accumulate_into=sums)


def add_groups(a: QTensor, b: QTensor, ids: jax.Array, sums: jax.Array) -> jax.Array:
    return grouped.grouped_fp8_gemm_k(a, b, ids, num_groups=2, accumulate_into=sums)


@pytest.mark.parametrize(
    ("function", "specs", "out", "args"),
    [
        (
            functools.partial(gemm.fp8_gemm, out_dtype=jnp.bfloat16), (ROWS, ALL), ROWS,
            (operand(256, 256), operand(128, 256, rows=128)),
        ),
        (
            add, (ROWS, ALL, ROWS), ROWS,
            (operand(256, 256), operand(128, 256), jax.ShapeDtypeStruct((256, 128), jnp.float32)),
        ),
        (
            functools.partial(grouped.grouped_fp8_gemm, out_dtype=jnp.bfloat16), (ROWS, ALL, ROWS), ROWS,
            (operand(512, 256), operand(2, 128, 256, rows=128), jax.ShapeDtypeStruct((4,), jnp.int32)),
        ),
        (
            functools.partial(grouped.grouped_fp8_gemm_masked, out_dtype=jnp.bfloat16), (ROWS, ROWS, ROWS), ROWS,
            (operand(2, 40, 256), operand(2, 128, 256, rows=128), jax.ShapeDtypeStruct((2,), jnp.int32)),
        ),
        (
            add_groups, (ROWS, ALL, ALL, P(None, "data")), P(None, "data"),
            (
                operand(256, 256), operand(128, 256), jax.ShapeDtypeStruct((2,), jnp.int32),
                jax.ShapeDtypeStruct((2, 256, 128), jnp.float32),
            ),
        ),
    ],
    ids=["dense", "added", "grouped", "masked", "groups added"],
)  # fmt: skip
def test_lowers_for_cuda_inside_shard_map(function, specs, out, args):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
    text = jax.jit(mapped).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
