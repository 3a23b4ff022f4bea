"""Small kernels of the self-check: one that is good, the others with a fault that only compiling shows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

MANY = (128, 384)
"""384 floats for each of the 128 threads of a warpgroup; a thread has 255 registers."""
FACTORS = (64, 128)
"""Two factors in bf16 of which the first 64 columns are multiplied."""
FAR = (2, 2**16, 2**25)
"""An array in bf16 whose halves are 2^42 bytes apart; in a descriptor strides are below 2^40."""


def spilling(x: jax.Array) -> jax.Array:
    """x divided by its sum, with all of x in the registers of one warpgroup."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x_ref, o_ref):
        everything = plgpu.load(x_ref, layout=plgpu.Layout.WG_STRIDED(MANY, 4))
        o_ref[...] = everything / jnp.sum(everything)

    return _kernel(body, MANY)(x)


def printing(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul twice, with a print while the first is under way; ptxas waits for one before it starts the next."""
    from jax.experimental import pallas as pl

    return _product(a, b, between=lambda: pl.debug_print("under way"))


def starved(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul by a warpgroup that gives up registers which its sums need."""
    return _product(a, b, multiplier_registers=24)


def specialised(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matmul by one warpgroup of what another copies; the first takes the registers that the other gives up."""
    return _product(a, b, copier_registers=40, multiplier_registers=232)


def far_apart(x: jax.Array) -> jax.Array:
    """A few rows of the first half of x."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = (1, 8, 64)

    def body(x_ref, o_ref, rows, arrived):
        plgpu.copy_gmem_to_smem(x_ref.at[tuple(pl.ds(0, size) for size in shape)], rows, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.copy_smem_to_gmem(rows, o_ref)
        plgpu.wait_smem_to_gmem(0)

    return _kernel(body, shape, jnp.bfloat16, scratch_types=(plgpu.SMEM(shape, jnp.bfloat16), plgpu.Barrier()))(x)


def _product(
    a: jax.Array,
    b: jax.Array,
    *,
    between: Callable[[], None] = lambda: None,
    copier_registers: int | None = None,
    multiplier_registers: int | None = None,
) -> jax.Array:
    """Twice the product of the first 64 columns of a and b, by a warpgroup that copies and one that multiplies."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile = (64, 64)

    def body(a_ref, b_ref, o_ref, a_tile, b_tile, arrived):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _copy():
            if copier_registers is not None:
                plgpu.set_max_registers(copier_registers, action="decrease")
            for source, target in ((a_ref, a_tile), (b_ref, b_tile)):
                plgpu.copy_gmem_to_smem(source.at[:, pl.ds(0, tile[1])], target, arrived)

        @pl.when(warpgroup == 1)
        def _multiply():
            if multiplier_registers is not None:
                grows = copier_registers is not None
                plgpu.set_max_registers(multiplier_registers, action="increase" if grows else "decrease")
            plgpu.barrier_wait(arrived)

            def add_products(sums):
                plgpu.wgmma(sums, a_tile, b_tile.T)
                between()
                plgpu.wgmma(sums, a_tile, b_tile.T)
                return sums[...]

            o_ref[...] = pl.run_scoped(add_products, plgpu.ACC(tile, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    staged = plgpu.SMEM(tile, jnp.bfloat16, transforms=transforms)
    return _kernel(
        body,
        tile,
        scratch_types=(staged, staged, plgpu.Barrier(num_arrivals=2)),
        num_threads=2,
        thread_name="warpgroup",
    )(a, b)


def _kernel(
    body: Callable[..., None], shape: tuple[int, ...], dtype=jnp.float32, **options
) -> Callable[..., jax.Array]:
    from dsv3_kernels import launch

    return launch.kernel(body, out_type=jax.ShapeDtypeStruct(shape, dtype), **options)
