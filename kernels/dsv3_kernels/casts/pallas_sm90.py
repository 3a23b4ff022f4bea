"""The casts of tokens, SwiGLU products and weights for Hopper: one pass over memory, everything else in registers.

Where K is a multiple of 128, the tiles of 1x128 lie one after another in memory, as do their scales, so that [M, K] is
cast as [M K / 128, 128] whatever M is. A warpgroup takes some of these rows, in loads of 16 bytes a thread; the lanes
of a warp share a row, and reduce it by shuffles. Nothing goes through shared memory.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.casts import cases
from dsv3_kernels.casts.pallas_rounding import round_rows, row_layout, store, to_e4m3
from dsv3_kernels.casts.pallas_tiles import kernel_over_tiles
from dsv3_kernels.quantize import QTensor
from dsv3_kernels.scales import reciprocal_of, scale_of

ROWS = (64, 32, 16, 8)
"""Rows of 128 a warpgroup may take; the first that divides what there is. 64 rows of bf16 are 8 loads a thread."""
MUST_CONTAIN = (r"F2FP\.SATFINITE\.E4M3", r"LDG?\.E\.128")
"""The conversion in hardware, loads of 16 bytes."""


def cast_tokens(
    x: Float[Array, "*batch K"], *, scale: str, num_sms: int | None = None, interpret: object = None
) -> QTensor:
    """The Hopper implementation of `api.cast_tokens`.

    Raises: NotImplementedError if K is no multiple of 128, or M K / 128 none of 8.
    """
    *batch, K = x.shape
    if K % 128:
        raise NotImplementedError(f"K={K} is no multiple of 128")
    tiles = x.reshape(-1, 128)
    rows = _rows(len(tiles), f"M K / 128 = {len(tiles)}")
    layout = row_layout(x.dtype)

    def cast(index, x_ref, values_ref, scales_ref):
        here = pl.ds(index[0] * rows, rows)
        x = plgpu.load(x_ref.at[here], layout=layout, optimized=False)
        amax = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)
        values, scales = round_rows(x.astype(jnp.float32), amax, scale, layout)
        store(values_ref.at[here], values)
        store(scales_ref.at[here], scales)

    values, scales = _kernel(cast, "cast_tokens", len(tiles), rows, num_sms, interpret)(tiles)
    return QTensor(values.reshape(x.shape), scales.reshape(*batch, K // 128))


def swiglu_cast(
    gate_up: Float[Array, "*batch F2"], *, scale: str, num_sms: int | None = None, interpret: object = None
) -> QTensor:
    """The Hopper implementation of `api.swiglu_cast`.

    Raises: NotImplementedError if F is no multiple of 1024, which is 8 tiles.
    """
    *batch, F2 = gate_up.shape
    F = F2 // 2
    if F % 128:
        raise NotImplementedError(f"F={F} is no multiple of 128")
    blocks = F // 128
    tiles = gate_up.reshape(-1, 128)
    rows = _rows(blocks if len(tiles) else 0, f"F / 128 = {blocks}", most=32)
    layout = row_layout(gate_up.dtype)

    def cast(index, x_ref, values_ref, scales_ref):
        first = index[0] * rows
        token = first // blocks
        # Rows of this token: its gates, then its ups, so that earlier tokens count twice.
        gates, ups = pl.ds(first + token * blocks, rows), pl.ds(first + (token + 1) * blocks, rows)
        gate = plgpu.load(x_ref.at[gates], layout=layout, optimized=False).astype(jnp.float32)
        up = plgpu.load(x_ref.at[ups], layout=layout, optimized=False).astype(jnp.float32)
        product = gate / (1.0 + jnp.exp(-gate)) * up
        values, scales = round_rows(product, jnp.max(jnp.abs(product), axis=1), scale, layout)
        store(values_ref.at[pl.ds(first, rows)], values)
        store(scales_ref.at[pl.ds(first, rows)], scales)

    values, scales = _kernel(cast, "swiglu_cast", len(tiles) // 2, rows, num_sms, interpret)(tiles)
    return QTensor(values.reshape(*batch, F), scales.reshape(*batch, blocks))


def cast_blocks(
    w: Float[Array, "*batch N K"], *, scale: str, num_sms: int | None = None, interpret: object = None
) -> QTensor:
    """The Hopper implementation of `api.cast_blocks`: a warpgroup holds a block of 128x128 in its registers.

    Raises: NotImplementedError if N or K is no multiple of 128.
    """
    *batch, N, K = w.shape
    if not w.size or N % 128 or K % 128:
        raise NotImplementedError(f"N={N} or K={K} is no positive multiple of 128")
    stacked = w.reshape(-1, K)
    layout = plgpu.Layout.WG_STRIDED((128, 128), 16 // w.dtype.itemsize)

    def cast(index, w_ref, values_ref, scales_ref):
        row, column = index
        here = (pl.ds(row * 128, 128), pl.ds(column * 128, 128))
        w = plgpu.load(w_ref.at[here], layout=layout)
        s = scale_of(jnp.max(jnp.abs(w)).astype(jnp.float32), scale)
        values = to_e4m3(w.astype(jnp.float32) * lax.broadcast(reciprocal_of(s), (128, 128)))
        store(values_ref.at[here], values)
        scales_ref[row, column] = s

    values, scales = kernel_over_tiles(
        cast,
        (len(stacked) // 128, K // 128),
        name="cast_blocks",
        out_type=(
            jax.ShapeDtypeStruct(stacked.shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((len(stacked) // 128, K // 128), jnp.float32),
        ),
        num_sms=num_sms,
        warpgroups=1,  # Mosaic reduces a whole tile in memory that a block has once
        interpret=interpret,
    )(stacked)
    return QTensor(values.reshape(w.shape), scales.reshape(*batch, N // 128, K // 128))


def aot_cases() -> list[AotCase]:
    """Each op for each dtype, once with powers of two, and each dtype in blocks that stay."""
    ops = {"cast_tokens": cast_tokens, "swiglu_cast": swiglu_cast, "cast_blocks": cast_blocks}
    return [
        AotCase(
            f"{case.op} {case.rows}x{case.columns} {case.dtype} {scale}{sms and f' {sms} SMs'}",
            functools.partial(ops[case.op], scale=scale, num_sms=sms or None),
            (jax.ShapeDtypeStruct((case.rows, case.columns), case.dtype),),
            MUST_CONTAIN,
        )
        for sms in ("", 108)
        for case, scale in cases.compiled(ops)
        if not sms or scale == "float32"
    ]


def _rows(count: int, what: str, most: int = ROWS[0]) -> int:
    """How many rows a warpgroup takes."""
    fitting = [rows for rows in ROWS if rows <= most and count % rows == 0]
    if not count or not fitting:
        raise NotImplementedError(f"{what} is no positive multiple of {ROWS[-1]}")
    return fitting[0]


def _kernel(cast: Callable, name: str, count: int, rows: int, num_sms: int | None, interpret: object) -> Callable:
    """A kernel that makes `count` rows of 128 values and their scales, `rows` in each tile."""
    return kernel_over_tiles(
        cast,
        (count // rows,),
        name=name,
        out_type=(
            jax.ShapeDtypeStruct((count, 128), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ),
        num_sms=num_sms,
        interpret=interpret,
    )
