"""Writing the latent cache one row after another, from the definitions alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from dsv3_kernels.varying import varying_as


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
) -> Shaped[Array, "N Z W"]:
    """`cache_write` by a loop over rows, which shares nothing with the other implementations."""
    B, T, _ = kv_down.shape
    N, page_size, _ = kv_pages.shape
    P = page_table.shape[1]

    def write_one(i, kv_pages):
        b, t = i // T, i % T
        row = _row(kv_down[b, t], norm_scale, cos[b, t], sin[b, t], eps, kv_pages.dtype, fp8_scale)
        position = starts[b].astype(jnp.int32) + t
        column, slot = position // page_size, position % page_size
        page = page_table[b, jnp.clip(column, 0, P - 1)].astype(jnp.int32)
        is_written = (t < counts[b].astype(jnp.int32)) & (position >= 0) & (column < P) & (page >= 0) & (page < N)
        place = (page, slot, jnp.int32(0))
        before = jax.lax.dynamic_slice(kv_pages, place, (1, 1, len(row)))
        return jax.lax.dynamic_update_slice(kv_pages, jnp.where(is_written, row, before), place)

    kv_pages = varying_as(kv_pages, kv_down, norm_scale, cos, sin, page_table, starts, counts)
    return jax.lax.fori_loop(0, B * T, write_one, kv_pages)


def _row(down, norm_scale, cos, sin, eps: float, dtype, fp8_scale: str) -> Shaped[Array, "W"]:
    """One row: the latent over its root mean square, each pair of the key part rotated as a complex number."""
    C = norm_scale.shape[0]
    x = down.astype(jnp.float32)
    latent = x[:C] / jnp.sqrt(jnp.vdot(x[:C], x[:C]) / C + jnp.float32(eps)) * norm_scale.astype(jnp.float32)
    rotated = jax.lax.complex(x[C::2], x[C + 1 :: 2]) * jax.lax.complex(cos, sin)
    rope = jnp.stack([rotated.real, rotated.imag], axis=1).ravel()
    if dtype == jnp.uint8:
        return _fp8_row(latent.astype(down.dtype), rope.astype(down.dtype), fp8_scale)
    return jnp.concatenate([latent, rope]).astype(dtype)


def _fp8_row(latent: Float[Array, "512"], rope: Float[Array, "64"], fp8_scale: str) -> UInt8[Array, "656"]:
    """Each tile of 128 over the scale that brings its largest magnitude to 448, E4M3's largest value."""
    values, scales = [], []
    for tile in jnp.split(latent.astype(jnp.float32), 4):
        scale = jnp.maximum(jnp.abs(tile).max(), jnp.float32(1e-4)) / jnp.float32(448)
        if fp8_scale == "ue8m0":
            mantissa, exponent = jnp.frexp(jnp.maximum(scale, jnp.float32(1e-4)))  # mantissa from 1/2 to 1
            power = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5).astype(exponent.dtype))
            scale = jnp.where(jnp.isfinite(scale), power, scale)
        else:
            scale = scale.astype(latent.dtype).astype(jnp.float32)
        values.append(jnp.clip(tile / scale, -448, 448).astype(jnp.float8_e4m3fn))
        scales.append(scale)
    parts = (jnp.concatenate(values), jnp.stack(scales), rope.astype(jnp.bfloat16))
    return jnp.concatenate([jax.lax.bitcast_convert_type(part, jnp.uint8).ravel() for part in parts])
