"""Writing the latent cache on Hopper: norm, rope, packing and the scatter in one kernel, in place.

A warp makes a row. The row is put together in shared memory and leaves by one bulk copy, of which only the first
address is computed, in 64 bits: a pool may have any size. Rows that go nowhere are not copied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels import launch
from dsv3_kernels.aot.case import AotCase
from dsv3_kernels.casts.pallas_rounding import store
from dsv3_kernels.latent_cache.cases import CASES, shapes
from dsv3_kernels.latent_cache.fp8_rows import LATENT_DIM, NUM_SCALES, ROPE_DIM, TILE
from dsv3_kernels.latent_cache.pallas_pack import across, bytes_of, quantize_tile, side_by_side, word_of
from dsv3_kernels.latent_cache.rows import destination

ROWS = 4
"""Rows of a block, one for each warp; few, so that a decoding step of 128 rows occupies 32 SMs. Of one to three rows
a block takes one or two, and several warps make the same row."""
UNIT_BYTES = 16
"""Bulk copies want every axis of the pool but the last in steps of 16 bytes: a row is seen as units of 16."""
ROPE_UNITS = 8
"""The rotary elements are eight units of four pairs in the pool, which has them in BF16 whatever the latent's type."""
PAIRS = ROPE_DIM // ROPE_UNITS // 2
FIRST_ROPE_UNIT = LATENT_DIM // (2 * PAIRS)
"""Of the down-projection."""
MUST_CONTAIN = (r"UBLKCP\.G\.S", r"(mul\.wide\.[us]32|mad\.(lo\.s64|wide\.[us]32))[^;]*, (656|1152)[,;]")
"""Bulk copies from shared to global memory; a row's address in 64 bits."""
MUST_CONTAIN_FP8 = (*MUST_CONTAIN, r"F2FP\.SATFINITE\.E4M3")
"""The conversion in hardware."""


def write(
    kv_pages: Shaped[Array, "N Z W"],
    kv_down: Float[Array, "B T X"],
    norm_scale: Float[Array, "C"],
    cos: Float[Array, "B T R_half"],
    sin: Float[Array, "B T R_half"],
    page_table: Int[Array, "B P"],
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    eps: float,
    fp8_scale: str,
    interpret: Any = None,
) -> Shaped[Array, "N Z W"]:
    """The Hopper implementation of `api.cache_write`; FP8 rows equal `pack_fp8_cache_rows`, but for the norm's bits.

    Args:
        interpret: None to compile; `plgpu.InterpretGPUParams()` to run on a CPU.
    """
    B, T, X = kv_down.shape
    N, page_size, W = kv_pages.shape
    unit = UNIT_BYTES // kv_pages.dtype.itemsize
    block_rows = min(ROWS, 1 << (B * T).bit_length() - 1)  # a power of two that there are
    page_table, starts, counts = (x.astype(jnp.int32) for x in (page_table, starts, counts))
    # A reference is an operand and a result at once, and the compiled module aliases the two.
    pool = jax.new_ref(kv_pages.reshape(N * page_size, W // unit, unit))

    def body(table_ref, starts_ref, counts_ref, *refs):
        block_start = lax.axis_index("block") * block_rows
        first = jnp.minimum(block_start, B * T - block_rows)  # the last block does not read past the end

        def target_of(row: int) -> jax.Array:
            """The row of the pool, or -1."""
            b, t = lax.div(first + row, jnp.int32(T)), lax.rem(first + row, jnp.int32(T))
            page, slot, is_written = destination(
                table_ref.at[b], starts_ref[b], counts_ref[b], t, num_pages=N, page_size=page_size
            )
            is_own = first + row >= block_start
            return jnp.where(is_written & is_own, page * page_size + slot, -1)

        targets = [target_of(row) for row in range(block_rows)]
        _write_rows(first, targets, *refs, eps=eps, fp8_scale=fp8_scale)

    launch.kernel(
        body,
        out_type=(),
        grid=(-(-B * T // block_rows),),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((block_rows, W // unit, unit), kv_pages.dtype)],
        interpret=interpret,
    )(
        page_table,
        starts,
        counts,
        kv_down.reshape(-1, X // unit, unit),
        kv_down.reshape(-1, X // (2 * PAIRS), 2 * PAIRS),
        norm_scale.reshape(-1, unit),
        cos.reshape(-1, ROPE_UNITS, PAIRS),
        sin.reshape(-1, ROPE_UNITS, PAIRS),
        pool,
    )
    return jax.freeze(pool).reshape(kv_pages.shape)


def aot_cases() -> list[AotCase]:
    """BF16 and FP8 rows of a decoding step, of drafts, of a prefill, into a pool of more than 2^31 elements."""
    return [
        AotCase(
            f"cache_write{'_fp8' * case.fp8} {case.name.replace('_fp8', '')}",
            functools.partial(write, eps=1e-6, fp8_scale=case.fp8_scale),
            tuple(jax.ShapeDtypeStruct(*each) for each in shapes(case, num_pages=2**17).values()),
            MUST_CONTAIN_FP8 if case.fp8 else MUST_CONTAIN,
        )
        for case in CASES
    ]


def _write_rows(
    first, targets, down_ref, key_ref, scale_ref, cos_ref, sin_ref, pool_ref, rows_ref, *, eps: float, fp8_scale: str
) -> None:
    """Makes a row for each of `targets`, from `first` on, and sends it there in the pool, or nowhere (-1).

    `down_ref` and `rows_ref` have rows of units as the pool has, `key_ref` of eight elements.
    """
    is_fp8, dtype = rows_ref.dtype == jnp.uint8, down_ref.dtype
    rows, row_units, unit = rows_ref.shape
    tile_units = TILE // unit
    here = pl.ds(first, rows)

    layout = _row_a_warp(rows, tile_units, unit)
    tiles = [pl.ds(tile * tile_units, tile_units) for tile in range(NUM_SCALES)]
    latent = [_load(down_ref.at[here, tile], layout).astype(jnp.float32) for tile in tiles]
    squares = functools.reduce(jnp.add, [x * x for x in latent])
    mean = jnp.sum(jnp.sum(squares, axis=2), axis=1) * jnp.float32(1 / LATENT_DIM)
    inverse_rms = across(lax.rsqrt(mean + jnp.float32(eps)), squares.shape, [0], layout)
    scales = []
    for tile, x in zip(tiles, latent, strict=True):
        norm_scale = _load(scale_ref.at[tile], layout.reduce(0)).astype(jnp.float32)
        normed = x * inverse_rms * across(norm_scale, x.shape, [1, 2], layout)
        if is_fp8:
            values, scale = quantize_tile(normed.astype(dtype), fp8_scale, layout)
            scales.append(lax.bitcast_convert_type(scale, jnp.int32))
        else:
            values = normed.astype(rows_ref.dtype)
        store(rows_ref.at[:, tile], values)
    if is_fp8:
        store(rows_ref.at[:, LATENT_DIM // unit], bytes_of(scales, _unit_a_warp(rows)))

    layout = _row_a_warp(rows, ROPE_UNITS, unit)
    pairs = _turned_pairs(key_ref.at[here], cos_ref.at[here], sin_ref.at[here], layout.reduce(2))
    if is_fp8:
        rope = bytes_of([word_of(*pair) for pair in pairs], layout)
    else:
        rope = side_by_side([x for pair in pairs for x in pair], layout)
    store(rows_ref.at[:, pl.ds(row_units - ROPE_UNITS, ROPE_UNITS)], rope)

    plgpu.commit_smem()
    for row, target in enumerate(targets):
        pl.when(target >= 0)(functools.partial(plgpu.copy_smem_to_gmem, rows_ref.at[row], pool_ref.at[target]))
    plgpu.wait_smem_to_gmem(0)


def _turned_pairs(key_ref, cos_ref, sin_ref, layout) -> list[tuple[jax.Array, jax.Array]]:
    """Rope of the interleaved pairs, in bfloat16 [rows, ROPE_UNITS] each: the four pairs of a unit are in one lane."""
    pairs = []
    for pair in range(PAIRS):
        even, odd = (
            _load(key_ref.at[:, pl.ds(FIRST_ROPE_UNIT, ROPE_UNITS), 2 * pair + i], layout).astype(jnp.float32)
            for i in range(2)
        )
        cos, sin = _load(cos_ref.at[:, :, pair], layout), _load(sin_ref.at[:, :, pair], layout)
        turned = even * cos - odd * sin, odd * cos + even * sin
        pairs.append(tuple(x.astype(jnp.bfloat16) for x in turned))
    return pairs


def _row_a_warp(rows: int, units: int, columns: int) -> Any:
    """[rows, units, columns] with a row in each warp, neighbouring columns in a lane."""
    tiling = plgpu.Tiling(((rows, units, columns), (units * columns // 32,)))
    return plgpu.Layout.TILED(tiling, _warps(rows, -4), lane_dims=(-3, -2), vector_dim=-1)


def _unit_a_warp(rows: int) -> Any:
    """[rows, UNIT_BYTES] with a row in each warp, as a row's statistics are after reductions over `_row_a_warp`."""
    tiling = plgpu.Tiling(((rows, UNIT_BYTES), (2,)))
    return plgpu.Layout.TILED(tiling, _warps(rows, -3), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1)


def _warps(rows: int, axis: int) -> tuple[Any, ...]:
    """The four warps over `axis`, which has `rows`: several make the same row where there are fewer than four."""
    if rows == ROWS:
        return (axis,)
    return (axis, plgpu.Replicated(ROWS // rows)) if rows > 1 else (plgpu.Replicated(ROWS),)


def _load(ref, layout) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)
