"""What `fp8_gemm` is compared with on a GPU, and DeepGEMM's published figures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_kernels.casts.api import cast_tokens
from dsv3_kernels.gemm.api import fp8_gemm
from dsv3_kernels.gemm.cases import (
    CASES,
    FORWARD,
    FORWARD_CASES,
    GRADIENT_CASES,
    HEADLINE,
    UGLY_CASES,
    WEIGHT_GRADIENT,
    GemmCase,
    GemmInputs,
    make_inputs,
    normal,
)
from dsv3_kernels.gpu.case import BenchCase, CheckCase, Comparison, Published, different_bits, fp8_comparisons
from dsv3_kernels.gpu.ceilings import bf16_product, fp8_product
from dsv3_kernels.gpu.torch_peer.problems import TorchGemm
from dsv3_kernels.quantize import quantize_tiles
from dsv3_kernels.sm90.tile import Tile

SOURCE = "DeepGEMM, H800"

DEEPGEMM = {
    (64, 2112, 7168): (206, 1688),
    (64, 24576, 1536): (289, 2455),
    (64, 32768, 512): (219, 2143),
    (64, 7168, 16384): (336, 2668),
    (64, 4096, 7168): (287, 2320),
    (64, 7168, 2048): (295, 2470),
    (128, 2112, 7168): (352, 1509),
    (128, 24576, 1536): (535, 2448),
    (128, 32768, 512): (358, 2103),
    (128, 7168, 16384): (645, 2604),
    (128, 4096, 7168): (533, 2221),
    (128, 7168, 2048): (510, 2277),
    (4096, 2112, 7168): (1127, 562),
    (4096, 24576, 1536): (1212, 962),
    (4096, 32768, 512): (775, 1620),
    (4096, 7168, 16384): (1520, 384),
    (4096, 4096, 7168): (1410, 541),
    (4096, 7168, 2048): (1168, 794),
}
"""TFLOPS and GB/s of (M, N, K), tables of 2025-04-09; 1550 TFLOPS was announced for M=4096, 7168 x 16384 later."""

TILES = ((1, 128), (128, 1), (128, 128))

NUM_SMS = (132, 108)
"""All of an H100, H800 or H200 SXM, and all but 24 that move tokens between devices meanwhile."""

ONE_TILE_ADDED = GemmCase("one_tile_added", 64, 64, 128, "one tile", WEIGHT_GRADIENT, accumulates=True, is_small=True)
ONE_CLUSTER = GemmCase("one_cluster", 64, 128, 128, "two tiles side by side", is_small=True)


def bench_cases() -> list[BenchCase]:
    """The published table, rows as called and on fewer multiprocessors, the other forward shapes, gradients."""
    return [
        *map(_bench, HEADLINE),
        *(_bench_called(case) for case in HEADLINE if case.n in (2112, 4096)),
        *(_bench_on(case, num_sms) for case in HEADLINE[-2:] for num_sms in NUM_SMS),
        *map(_bench, (*FORWARD_CASES, *GRADIENT_CASES)),
    ]


def check_cases() -> list[CheckCase]:
    """Every case against the matmul of the unquantised operands; power-of-two scales; the operands themselves."""
    ordered = (*UGLY_CASES, *(case for case in CASES if not case.is_small))
    powers = [case for case in HEADLINE if case.n == 4096]
    return [
        *(_check_quantiser(tile, scale) for tile in TILES for scale in ("float32", "ue8m0")),
        _check_path("TMA add", ONE_TILE_ADDED, Tile(64, 64, 2)),
        _check_path("multicast", ONE_CLUSTER, Tile(64, 64, 2, "n")),
        *(_check(case) for case in ordered),
        *(_check(case, scale="ue8m0") for case in powers),
    ]


def num_bytes(case: GemmCase) -> int:
    """E4M3 operands read once, the result written once, what it accumulates into read once; scales not counted."""
    result = case.m * case.n * jnp.dtype(case.out_dtype).itemsize
    return case.m * case.k + case.n * case.k + result * (2 if case.accumulates else 1)


def _bench(case: GemmCase) -> BenchCase:
    published = DEEPGEMM.get((case.m, case.n, case.k)) if case.role == FORWARD else None
    return BenchCase(
        op="fp8_gemm",
        name=case.name,
        make_inputs=functools.partial(make_inputs, case),
        kernel=functools.partial(_run, case, implementation="pallas"),
        others={"XLA bf16": functools.partial(_bf16, case), "XLA FP8 (no scales)": functools.partial(_fp8, case)},
        flops=2.0 * case.m * case.n * case.k,
        num_bytes=num_bytes(case),
        published=Published(SOURCE, *published) if published else None,
        torch=TorchGemm(case.m, case.n, case.k) if case.role == FORWARD else None,
        is_quick=case in HEADLINE and case.n in (4096, 2112),
    )


def _bench_called(case: GemmCase) -> BenchCase:
    """As a layer calls it, from activations in bf16: with their cast."""

    def kernel(inputs: GemmInputs) -> Array:
        a = cast_tokens(inputs.exact_a, implementation="pallas")
        return _run(case, inputs._replace(a=a), implementation="pallas")

    return BenchCase(
        op="fp8_gemm",
        name=f"{case.name} as called, from bf16",
        make_inputs=functools.partial(make_inputs, case),
        kernel=kernel,
        others={"XLA bf16": functools.partial(_bf16, case)},
        flops=2.0 * case.m * case.n * case.k,
        num_bytes=num_bytes(case) + case.m * case.k,
        num_launches=2,
    )


def _bench_on(case: GemmCase, num_sms: int) -> BenchCase:
    """What is left to a matmul beside communication."""
    return _bench(case)._replace(
        name=f"{case.name} on {num_sms} SMs",
        kernel=functools.partial(_run, case, implementation="pallas", num_sms=num_sms),
        others={},
        published=None,
        torch=None,
        is_quick=False,
        goal_share=num_sms / NUM_SMS[0],
    )


def _check(case: GemmCase, scale: str = "float32") -> CheckCase:
    return CheckCase(
        op="fp8_gemm",
        name=case.name if scale == "float32" else f"{case.name}_{scale}",
        make_inputs=functools.partial(make_inputs, case, scale=scale),
        run=functools.partial(_run, case),
        comparisons=fp8_comparisons(
            jax.jit(_exact), jax.jit(functools.partial(_run, case, implementation="xla")), case.m * case.n
        ),
        is_small=case.is_small,
        is_plain=case.m == 0,
    )


def _check_path(path: str, case: GemmCase, tile: Tile) -> CheckCase:
    """With a tile that surely takes the path and no other one."""

    def run(inputs: GemmInputs, form: str) -> Array:
        if form != "pallas":
            return _run(case, inputs, form)
        from dsv3_kernels.gemm import pallas_sm90  # when first used, as in `api`

        return pallas_sm90.fp8_gemm(
            inputs.a, inputs.b, out_dtype=case.out_dtype, accumulate_into=inputs.accumulate_into, tile=tile
        )

    return _check(case)._replace(run=run, path=path)


def _run(case: GemmCase, inputs: GemmInputs, implementation: str, num_sms: int | None = None) -> Array:
    return fp8_gemm(
        inputs.a,
        inputs.b,
        out_dtype=case.out_dtype,
        accumulate_into=inputs.accumulate_into,
        implementation=implementation,
        num_sms=num_sms,
    )


def _exact(inputs: GemmInputs) -> Array:
    """The matmul of the unquantised operands; bf16 factors are exact in XLA's matmul, sums are float32."""
    return _added(bf16_product(inputs.exact_a, inputs.exact_b, jnp.float32), inputs)


def _bf16(case: GemmCase, inputs: GemmInputs) -> Array:
    return _added(bf16_product(inputs.exact_a, inputs.exact_b, case.out_dtype), inputs)


def _fp8(case: GemmCase, inputs: GemmInputs) -> Array:
    """Not the same result: without the scales."""
    return _added(fp8_product(inputs.a.values, inputs.b.values, case.out_dtype), inputs)


def _added(product: Array, inputs: GemmInputs) -> Array:
    return product if inputs.accumulate_into is None else product + inputs.accumulate_into


def _check_quantiser(tile: tuple[int, int], scale: str) -> CheckCase:
    """Scales and values of `quantize_tiles` compiled for this device are those of NumPy, bit for bit."""
    quantize = functools.partial(quantize_tiles, tile=tile, scale=scale)
    return CheckCase(
        op="quantize_tiles",
        name=f"{tile[0]}x{tile[1]}_{scale}",
        make_inputs=lambda key: normal(key, (385, 640)),
        run=lambda x, implementation: quantize(x),
        comparisons=(Comparison("bits", lambda x: quantize(np.asarray(x)), different_bits, 0.0),),
        is_small=True,
    )
