"""What the grouped FP8 GEMMs are compared with on a GPU, and DeepGEMM's published figures."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.casts.api import cast_tokens
from dsv3_kernels.gpu.case import BenchCase, CheckCase, Published, fp8_comparisons
from dsv3_kernels.gpu.ceilings import bf16_product, fp8_product
from dsv3_kernels.grouped_gemm import cases
from dsv3_kernels.grouped_gemm.api import grouped_fp8_gemm, grouped_fp8_gemm_k, grouped_fp8_gemm_masked
from dsv3_kernels.grouped_gemm.cases import ContiguousCase, ContractionCase, GroupedInputs, MaskedCase
from dsv3_kernels.operands import BLOCK

SOURCE = "DeepGEMM, H800"

NUM_SMS = (132, 108)
"""As of `gemm.bench`."""

CONTIGUOUS_DEEPGEMM = {
    (4, 8192, 4096, 7168): (1346, 434),
    (4, 8192, 7168, 2048): (1214, 752),
    (8, 4096, 4096, 7168): (1346, 516),
    (8, 4096, 7168, 2048): (1214, 826),
}
MASKED_DEEPGEMM = {
    (1, 1024, 4096, 7168): (1233, 924),
    (1, 1024, 7168, 2048): (925, 968),
    (2, 512, 4096, 7168): (1040, 1288),
    (2, 512, 7168, 2048): (916, 1405),
    (4, 256, 4096, 7168): (932, 2064),
    (4, 256, 7168, 2048): (815, 2047),
}
"""TFLOPS and GB/s of (groups, rows a group, N, K), tables of 2025-04-09; masked with all rows valid."""

Product = Callable[[Array, Array], Array]


def bench_cases() -> list[BenchCase]:
    """The published tables, rows as called and on fewer multiprocessors, ragged groups, decoding, weight gradients."""
    contiguous = [case for case in cases.CONTIGUOUS_CASES if not case.is_small]
    masked = [case for case in cases.MASKED_CASES if not case.is_small]
    contraction = [case for case in cases.CONTRACTION_CASES if not case.is_small and 0 not in case.blocks]
    return [
        *(_bench_contiguous(case) for case in contiguous),
        *(_bench_masked(case) for case in masked),
        *(_bench_contraction(case) for case in contraction),
        *(_called(_bench_contiguous(case), _contiguous, case.m * case.k) for case in contiguous[:2]),
        *(_called(_bench_masked(case), _masked, sum(case.valid) * case.k) for case in masked[:2]),
        *(_on(_bench_contiguous(case), _contiguous, num_sms) for case in contiguous[:2] for num_sms in NUM_SMS),
        *(_on(_bench_masked(case), _masked, num_sms) for case in masked[:2] for num_sms in NUM_SMS),
    ]


def check_cases() -> list[CheckCase]:
    """Every case, small ones first, against the matmuls of the unquantised operands."""
    return [
        *(_check_contiguous(case) for case in _small_first(cases.CONTIGUOUS_CASES)),
        *(_check_masked(case) for case in _small_first(cases.MASKED_CASES)),
        *(_check_contraction(case) for case in _small_first(cases.CONTRACTION_CASES)),
    ]


def _small_first(table: Sequence) -> list:
    return sorted(table, key=lambda case: not case.is_small)


def _called(row: BenchCase, run: Callable[..., Array], num_elements: int) -> BenchCase:
    """As a layer calls it, from rows in bf16: with their cast."""

    def kernel(inputs: GroupedInputs) -> Array:
        a = cast_tokens(inputs.exact_a, implementation="pallas")
        return run(inputs._replace(a=a), implementation="pallas")

    return row._replace(
        name=f"{row.name} as called, from bf16",
        kernel=kernel,
        others={name: way for name, way in row.others.items() if "bf16" in name},
        num_bytes=row.num_bytes + num_elements,
        published=None,
        num_launches=2,
        is_quick=False,
    )


def _on(row: BenchCase, run: Callable[..., Array], num_sms: int) -> BenchCase:
    """What is left to matmuls beside communication."""
    return row._replace(
        name=f"{row.name} on {num_sms} SMs",
        kernel=functools.partial(run, implementation="pallas", num_sms=num_sms),
        others={},
        published=None,
        is_quick=False,
        goal_share=num_sms / NUM_SMS[0],
    )


# Contiguous groups of rows


def _bench_contiguous(case: ContiguousCase) -> BenchCase:
    groups, rows = len(case.blocks), case.blocks[0] * BLOCK
    figures = CONTIGUOUS_DEEPGEMM.get((groups, rows, case.n, case.k)) if _is_even(case.blocks) else None
    others = {"XLA bf16": functools.partial(_contiguous_bf16, case)}
    if _is_even(case.blocks):
        others["XLA FP8 (no scales)"] = functools.partial(_contiguous_fp8, case)
    return BenchCase(
        op="grouped_fp8_gemm",
        name=case.name,
        make_inputs=functools.partial(cases.make_contiguous, case),
        kernel=functools.partial(_contiguous, implementation="pallas"),
        others=others,
        flops=2.0 * sum(case.blocks) * BLOCK * case.n * case.k,
        num_bytes=case.m * case.k + groups * case.n * case.k + 2 * case.m * case.n,
        published=Published(SOURCE, *figures) if figures else None,
        is_quick=figures is not None,
    )


def _check_contiguous(case: ContiguousCase) -> CheckCase:
    exact = functools.partial(_contiguous_products, case, functools.partial(bf16_product, out_dtype=jnp.float32))
    return CheckCase(
        op="grouped_fp8_gemm",
        name=case.name,
        make_inputs=functools.partial(cases.make_contiguous, case),
        run=_contiguous,
        comparisons=fp8_comparisons(
            jax.jit(lambda inputs: exact(inputs.exact_a, inputs.exact_b)),
            jax.jit(functools.partial(_contiguous, implementation="xla")),
            sum(case.blocks) * BLOCK * case.n,
        ),
        is_small=case.is_small,
        is_plain=case.m == 0,
    )


def _contiguous(inputs: GroupedInputs, implementation: str, num_sms: int | None = None) -> Array:
    return grouped_fp8_gemm(inputs.a, inputs.b, inputs.groups, implementation=implementation, num_sms=num_sms)


def _contiguous_bf16(case: ContiguousCase, inputs: GroupedInputs) -> Array:
    """One batched matmul for groups of one size, else one matmul a group."""
    if not _is_even(case.blocks):
        return _contiguous_products(case, bf16_product, inputs.exact_a, inputs.exact_b)
    return bf16_product(inputs.exact_a.reshape(len(case.blocks), -1, case.k), inputs.exact_b)


def _contiguous_fp8(case: ContiguousCase, inputs: GroupedInputs) -> Array:
    """Not the same result: without the scales."""
    return fp8_product(inputs.a.values.reshape(len(case.blocks), -1, case.k), inputs.b.values)


def _contiguous_products(case: ContiguousCase, product: Product, a: Array, b: Array) -> Array:
    """Each group's rows times its own b; zeros at the end, for what is skipped."""
    sizes = [blocks * BLOCK for blocks in case.blocks]
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    parts = [product(a[start : start + size], b[group]) for group, (start, size) in enumerate(zip(starts, sizes))]
    skipped = jnp.zeros((case.skipped * BLOCK, case.n), parts[0].dtype)
    return jnp.concatenate([*parts, skipped])


# Padded groups of rows


def _bench_masked(case: MaskedCase) -> BenchCase:
    groups, rows = len(case.valid), sum(case.valid)
    figures = MASKED_DEEPGEMM.get((groups, case.m, case.n, case.k)) if rows == groups * case.m else None
    return BenchCase(
        op="grouped_fp8_gemm_masked",
        name=case.name,
        make_inputs=functools.partial(cases.make_masked, case),
        kernel=functools.partial(_masked, implementation="pallas"),
        others={
            "XLA bf16 (all rows)": lambda inputs: bf16_product(inputs.exact_a, inputs.exact_b),
            "XLA FP8 (all rows, no scales)": lambda inputs: fp8_product(inputs.a.values, inputs.b.values),
        },
        flops=2.0 * rows * case.n * case.k,
        num_bytes=rows * case.k + groups * case.n * case.k + 2 * groups * case.m * case.n,
        published=Published(SOURCE, *figures) if figures else None,
        is_quick=figures is not None,
    )


def _check_masked(case: MaskedCase) -> CheckCase:
    return CheckCase(
        op="grouped_fp8_gemm_masked",
        name=case.name,
        make_inputs=functools.partial(cases.make_masked, case),
        run=_masked,
        comparisons=fp8_comparisons(
            jax.jit(_masked_exact),
            jax.jit(functools.partial(_masked, implementation="xla")),
            sum(case.valid) * case.n,
        ),
        is_small=case.is_small,
    )


def _masked(inputs: GroupedInputs, implementation: str, num_sms: int | None = None) -> Array:
    return grouped_fp8_gemm_masked(inputs.a, inputs.b, inputs.groups, implementation=implementation, num_sms=num_sms)


def _masked_exact(inputs: GroupedInputs) -> Array:
    product = bf16_product(inputs.exact_a, inputs.exact_b, jnp.float32)
    is_valid = jnp.arange(product.shape[1], dtype=jnp.int32)[None, :] < inputs.groups[:, None]
    return jnp.where(is_valid[:, :, None], product, jnp.zeros_like(product))


# Groups along the contraction


def _bench_contraction(case: ContractionCase) -> BenchCase:
    groups = len(case.blocks)
    result = groups * case.m * case.n * 4
    return BenchCase(
        op="grouped_fp8_gemm_k",
        name=case.name,
        make_inputs=functools.partial(cases.make_contraction, case),
        kernel=functools.partial(_contraction, case, implementation="pallas"),
        others={"XLA bf16": functools.partial(_contraction_bf16, case)},
        flops=2.0 * sum(case.blocks) * BLOCK * case.m * case.n,
        num_bytes=(case.m + case.n) * case.k + result * (2 if case.accumulates else 1),
        is_quick=(groups, case.m, case.accumulates) == (4, 7168, False),
    )


def _check_contraction(case: ContractionCase) -> CheckCase:
    return CheckCase(
        op="grouped_fp8_gemm_k",
        name=case.name,
        make_inputs=functools.partial(cases.make_contraction, case),
        run=functools.partial(_contraction, case),
        comparisons=fp8_comparisons(
            jax.jit(functools.partial(_contraction_bf16, case)),
            jax.jit(functools.partial(_contraction, case, implementation="xla")),
            len(case.blocks) * case.m * case.n,
        ),
        is_small=case.is_small,
        is_plain=case.k == 0,
    )


def _contraction(case: ContractionCase, inputs: GroupedInputs, implementation: str) -> Array:
    return grouped_fp8_gemm_k(
        inputs.a,
        inputs.b,
        inputs.groups,
        num_groups=len(case.blocks),
        accumulate_into=inputs.accumulate_into,
        implementation=implementation,
    )


def _contraction_bf16(case: ContractionCase, inputs: GroupedInputs) -> Array:
    """One matmul a group, float32 results; the matmul of the unquantised operands, for bf16 factors are exact."""
    products, start = [], 0
    for blocks in case.blocks:
        part = slice(start, start + blocks * BLOCK)
        products.append(bf16_product(inputs.exact_a[:, part], inputs.exact_b[:, part], jnp.float32))
        start = part.stop
    stacked = jnp.stack(products)
    return stacked if inputs.accumulate_into is None else stacked + inputs.accumulate_into


def _is_even(blocks: Sequence[int]) -> bool:
    return len(set(blocks)) == 1
