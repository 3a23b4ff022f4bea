"""An FP8 matmul is one launch: its program for a GPU holds the kernel, and no pass over operands, sums or results."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import dsv3_kernels
from dsv3_kernels import dispatch
from dsv3_kernels.gemm import cases as dense
from dsv3_kernels.grouped_gemm import cases as grouped
from dsv3_kernels.sm90.shapes import integers, operand
from dsv3_kernels.sm90.tile import MOST_WHOLE
from tests.dsv3_kernels.grids import grids

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

Call = tuple[Callable[..., jax.Array], tuple[Any, ...]]
H100 = 132


def of_dense(case: dense.GemmCase) -> Call:
    rows = 1 if case.role == dense.WEIGHT_GRADIENT else 128
    sums = jax.ShapeDtypeStruct((case.m, case.n), jnp.float32) if case.accumulates else None
    function = functools.partial(dsv3_kernels.fp8_gemm, out_dtype=case.out_dtype, implementation="pallas")

    def call(a, b, sums, num_sms=None):
        return function(a, b, accumulate_into=sums, num_sms=num_sms)

    return call, (operand((case.m, case.k), 1), operand((case.n, case.k), rows), sums)


def of_contiguous(case: grouped.ContiguousCase) -> Call:
    b = operand((len(case.blocks), case.n, case.k), 128)
    return dsv3_kernels.grouped_fp8_gemm, (operand((case.m, case.k), 1), b, integers(case.m // 128))


def of_masked(case: grouped.MaskedCase) -> Call:
    groups = len(case.valid)
    b = operand((groups, case.n, case.k), 128)
    return dsv3_kernels.grouped_fp8_gemm_masked, (operand((groups, case.m, case.k), 1), b, integers(groups))


def of_contraction(case: grouped.ContractionCase) -> Call:
    groups = len(case.blocks)
    sums = jax.ShapeDtypeStruct((groups, case.m, case.n), jnp.float32) if case.accumulates else None

    def call(a, b, ids, sums, num_sms=None):
        return dsv3_kernels.grouped_fp8_gemm_k(
            a, b, ids, num_groups=groups, accumulate_into=sums, num_sms=num_sms, implementation="pallas"
        )

    return call, (operand((case.m, case.k), 1), operand((case.n, case.k), 1), integers(case.k // 128), sums)


def lowered(call: Call, **options: Any) -> jax.stages.Lowered:
    function, args = call
    return jax.jit(functools.partial(function, **options)).trace(*args).lower(lowering_platforms=("cuda",))


def beside_the_kernel(call: Call) -> list[str]:
    """The operations of a program other than its one kernel; reshapes move nothing."""
    operations = re.findall(r"= \"?stablehlo\.(\w+)", lowered(call).as_text())
    assert operations.count("custom_call") == 1, operations
    return sorted(set(operations) - {"custom_call", "reshape"})


def is_padded(call: Call) -> bool:
    """Whether the copy engine cannot read operands: rows that are no eights, or long rows of scales of no 16 bytes."""
    rows, contraction = call[1][0].values.shape[-2:]
    blocks = math.ceil(contraction / 128)
    return rows % 8 != 0 or (blocks % 4 != 0 and blocks > MOST_WHOLE)


CALLS = {
    **{case.name: of_dense(case) for case in dense.CASES if not case.is_small},
    **{f"contiguous {case.name}": of_contiguous(case) for case in grouped.CONTIGUOUS_CASES if not case.is_small},
    **{f"masked {case.name}": of_masked(case) for case in grouped.MASKED_CASES if not case.is_small},
    **{f"contraction {case.name}": of_contraction(case) for case in grouped.CONTRACTION_CASES if not case.is_small},
}
FAST = [
    "m64_n2112_k7168",
    "m128_n4096_k7168",
    "m4096_n7168_k16384",
    "m4096_n7168_k576",
    next(case.name for case in dense.CASES if case.accumulates and not case.is_small),
    f"contiguous {grouped.HEADLINE_CONTIGUOUS[0].name}",
    f"masked {grouped.HEADLINE_MASKED[0].name}",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CALLS])
def test_a_product_is_one_launch(name):
    """What is left: one row, and weight gradients of a number of tokens that 512 does not divide, are padded."""
    beside = beside_the_kernel(CALLS[name])
    if is_padded(CALLS[name]):
        assert set(beside) <= {"pad", "constant", "convert", "slice"}, name
    else:
        assert beside == []


@pytest.mark.parametrize("name", ["m64_n2112_k7168", "m4096_n7168_k16384", *FAST[4:]])
def test_a_product_starts_no_more_blocks_than_it_may_use_multiprocessors(name):
    def blocks(num_sms: int | None) -> int:
        [grid] = grids(lowered(CALLS[name], num_sms=num_sms))
        return math.prod(grid)

    assert blocks(None) == H100
    assert blocks(100) == 100
    assert blocks(1) == 1
