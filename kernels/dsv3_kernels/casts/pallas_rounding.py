"""Rounding inside a Hopper kernel, with the bits of `quantize.quantize_tiles`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.scales import E4M3_MAX, reciprocal_of, scale_of


def round_rows(x: jax.Array, amax: jax.Array, scale: str, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Values and scales of x [rows, columns] float32 in `layout`, whose rows have the largest magnitudes `amax`."""
    scales = scale_of(amax, scale)
    reciprocals = plgpu.layout_cast(lax.broadcast_in_dim(reciprocal_of(scales), x.shape, [0]), layout)
    return to_e4m3(x * reciprocals), scales


def to_e4m3(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest E4M3; what is beyond +-448 becomes that."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def store(ref: Any, x: jax.Array) -> None:
    """ref[...] = x in any layout of x: jax 0.12 needs a flag that allows narrow stores, 0.11.2 does not ask."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory whose rows of 128 bytes are shuffled by TMA's pattern, so that columns lie in different banks."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def row_layout(dtype: jax.typing.DTypeLike) -> Any:
    """Rows of 128 over the lanes of a warp: two rows, 8 elements a lane, or of float32 one row, 4 elements a lane."""
    if jnp.dtype(dtype).itemsize == 4:
        return plgpu.Layout.TILED(plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )
