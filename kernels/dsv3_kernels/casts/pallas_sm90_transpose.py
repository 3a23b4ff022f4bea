"""Dequantise, transpose, requantise for Hopper: one read and one write of a byte an element.

A warpgroup takes 128 tokens of 128 channels. E4M3 is exact in float16, which is what Hopper transposes on its way from
shared memory (ldmatrix.trans; there is none for bytes), so the tile is widened, stored, and read back transposed. In
the transposed tile a row is one channel: it is scaled by the tokens' scales, reduced by shuffles, rounded, and leaves
through shared memory by TMA, half of the channels at a time to spare registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.casts import cases
from dsv3_kernels.casts.pallas_rounding import round_rows, row_layout, store, swizzled
from dsv3_kernels.casts.pallas_tiles import kernel_over_tiles
from dsv3_kernels.quantize import QTensor

TILE, HALF = 128, 64
MUST_CONTAIN = (r"LDSM\.16\.MT88\.4", r"F2FP\.SATFINITE\.E4M3", r"UTMASTG")
"""Transposition while loading from shared memory, the conversion in hardware, the store by TMA."""


def requantize_transposed(q: QTensor, *, scale: str, num_sms: int | None = None, interpret: object = None) -> QTensor:
    """The Hopper implementation of `api.requantize_transposed`.

    Raises: NotImplementedError if M or K is no multiple of 128.
    """
    M, K = q.values.shape
    if not q.values.size or M % 128 or K % 128:
        raise NotImplementedError(f"M={M} or K={K} is no positive multiple of 128")
    loaded, turned = row_layout(jnp.bfloat16), plgpu.Layout.WGMMA

    def cast(index, values_ref, scales_ref, out_ref, out_scales_ref, wide_ref, token_scales_ref, half_ref):
        k, m = index
        tokens = pl.ds(m * TILE, TILE)
        values = plgpu.load(values_ref.at[tokens, pl.ds(k * TILE, TILE)], layout=loaded, optimized=False)
        token_scales = plgpu.load(scales_ref.at[tokens, k], layout=loaded.reduce(1), optimized=False)
        wide_ref[...] = values.astype(jnp.float16)
        store(token_scales_ref, token_scales)
        token_scales = plgpu.load(token_scales_ref, layout=turned.reduce(0), optimized=False)
        for half in range(2):
            channels = pl.ds(k * TILE + half * HALF, HALF)
            x = plgpu.load(wide_ref.at[:, pl.ds(half * HALF, HALF)].T, layout=turned).astype(jnp.float32)
            x = x * plgpu.layout_cast(lax.broadcast_in_dim(token_scales, x.shape, [1]), turned)
            rounded, channel_scales = round_rows(x, jnp.max(jnp.abs(x), axis=1), scale, turned)
            half_ref[half] = rounded
            store(out_scales_ref.at[channels, m], channel_scales)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(half_ref.at[half], out_ref.at[channels, tokens])
        plgpu.wait_smem_to_gmem(0)

    def scratch_types(*lead: int) -> list:
        return [
            swizzled((*lead, TILE, TILE), jnp.float16),
            plgpu.SMEM((*lead, TILE), jnp.float32),
            swizzled((*lead, 2, HALF, TILE), jnp.float8_e4m3fn),
        ]

    values, scales = kernel_over_tiles(
        cast,
        (K // TILE, M // TILE),
        name="requantize_transposed",
        out_type=(
            jax.ShapeDtypeStruct((K, M), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((K, M // 128), jnp.float32),
        ),
        num_sms=num_sms,
        scratch_types=scratch_types,
        interpret=interpret,
    )(q.values, q.scales)
    return QTensor(values, scales)


def aot_cases() -> list[AotCase]:
    """A real shape with each kind of scale, and in blocks that stay."""
    return [
        AotCase(
            f"{case.op} {case.rows}x{case.columns} {scale}{sms and f' {sms} SMs'}",
            functools.partial(requantize_transposed, scale=scale, num_sms=sms or None),
            (
                QTensor(
                    jax.ShapeDtypeStruct((case.rows, case.columns), jnp.float8_e4m3fn),
                    jax.ShapeDtypeStruct((case.rows, case.columns // 128), jnp.float32),
                ),
            ),
            MUST_CONTAIN,
        )
        for sms in ("", 108)
        for case, scale in cases.compiled(("requantize_transposed",))
        if not sms or scale == "float32"
    ]
