"""What the grouped bf16 GEMMs are compared with on a GPU: forward, input gradient, weight gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison, diff, worst
from dsv3_kernels.grouped_gemm_bf16 import cases
from dsv3_kernels.grouped_gemm_bf16.api import grouped_matmul, grouped_matmul_k
from dsv3_kernels.grouped_gemm_bf16.cases import GroupedCase, GroupedInputs

Run = Callable[..., Array]
"""(case, inputs, implementation) -> the result."""
Plain = Callable[[GroupedCase, GroupedInputs], Array]


def bench_cases() -> list[BenchCase]:
    """All three directions of each layer."""
    large = [case for case in cases.CASES if not case.is_small]
    return [_bench(direction, case) for case in large for direction in DIRECTIONS]


def check_cases() -> list[CheckCase]:
    """Every case in all three directions, small ones first."""
    ordered = sorted(cases.CASES, key=lambda case: not case.is_small)
    return [_check(direction, case) for case in ordered for direction in DIRECTIONS]


def _forward(case: GroupedCase, inputs: GroupedInputs, implementation: str) -> Array:
    return grouped_matmul(inputs.rows, inputs.weights, inputs.groups, implementation=implementation)


def _input_gradient(case: GroupedCase, inputs: GroupedInputs, implementation: str) -> Array:
    return grouped_matmul(inputs.d_out, inputs.weights, inputs.groups, transposed=True, implementation=implementation)


def _weight_gradient(case: GroupedCase, inputs: GroupedInputs, implementation: str) -> Array:
    return grouped_matmul_k(
        inputs.rows, inputs.d_out, inputs.groups, num_groups=len(case.sizes), implementation=implementation
    )


def _plain_forward(case: GroupedCase, inputs: GroupedInputs) -> Array:
    return _by_group(case, "ma,az->mz", inputs.rows, inputs.weights)


def _plain_input_gradient(case: GroupedCase, inputs: GroupedInputs) -> Array:
    return _by_group(case, "mz,az->ma", inputs.d_out, inputs.weights)


def _plain_weight_gradient(case: GroupedCase, inputs: GroupedInputs) -> Array:
    return jnp.stack(
        [
            jnp.einsum("ma,mz->az", inputs.rows[part], inputs.d_out[part], preferred_element_type=jnp.float32)
            for part in _parts(case)
        ]
    )


DIRECTIONS: dict[str, tuple[str, Run, Plain]] = {
    "forward": ("grouped_matmul", _forward, _plain_forward),
    "input_gradient": ("grouped_matmul", _input_gradient, _plain_input_gradient),
    "weight_gradient": ("grouped_matmul_k", _weight_gradient, _plain_weight_gradient),
}


def _bench(direction: str, case: GroupedCase) -> BenchCase:
    op, run, plain = DIRECTIONS[direction]
    rows, groups = sum(case.sizes) * case.block, len(case.sizes)
    weight_size = 4 if op == "grouped_matmul_k" else 2
    others = {"XLA, a matmul a group": functools.partial(plain, case)}
    if direction == "forward":
        others["jax.lax.ragged_dot"] = functools.partial(_ragged_dot, case)
    return BenchCase(
        op=op,
        name=f"{case.name}_{direction}",
        make_inputs=functools.partial(cases.make_inputs, case),
        kernel=functools.partial(run, case, implementation="pallas"),
        others=others,
        flops=2.0 * rows * case.inner * case.outer,
        num_bytes=2.0 * rows * (case.inner + case.outer) + weight_size * groups * case.inner * case.outer,
        is_quick=case.is_quick,
        is_bf16=True,
    )


def _check(direction: str, case: GroupedCase) -> CheckCase:
    op, run, plain = DIRECTIONS[direction]
    expected = jax.jit(functools.partial(plain, case))
    return CheckCase(
        op=op,
        name=f"{case.name}_{direction}",
        make_inputs=functools.partial(cases.make_inputs, case),
        run=functools.partial(run, case),
        comparisons=(
            Comparison("matmul a group", expected, diff, 1e-5),
            Comparison("worst element", expected, worst, 1.0),
        ),
        is_small=case.is_small,
        is_plain=case.num_rows == 0,
    )


def _ragged_dot(case: GroupedCase, inputs: GroupedInputs) -> Array:
    sizes = jnp.asarray(case.sizes, jnp.int32) * case.block
    return jax.lax.ragged_dot(inputs.rows, inputs.weights, sizes)


def _by_group(case: GroupedCase, product: str, rows: Array, weights: Array) -> Array:
    """Each group's rows times its own weight; zeros at the end, for what is skipped."""
    parts = [
        jnp.einsum(product, rows[part], weights[group], preferred_element_type=rows.dtype)
        for group, part in enumerate(_parts(case))
    ]
    skipped = jnp.zeros((case.skipped * case.block, parts[0].shape[1]), rows.dtype)
    return jnp.concatenate([*parts, skipped])


def _parts(case: GroupedCase) -> list[slice]:
    ends = [sum(case.sizes[: group + 1]) * case.block for group in range(len(case.sizes))]
    return [slice(end - size * case.block, end) for end, size in zip(ends, case.sizes, strict=True)]
