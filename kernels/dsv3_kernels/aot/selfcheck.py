"""A kernel that must fail: it spills registers and multiplies nothing."""

import jax
import jax.numpy as jnp

from dsv3_kernels.aot.case import FP8_MMA, AotCase

SHAPE = (128, 384)
"""384 floats for each of the 128 threads of a warpgroup; a thread has 255 registers."""


def spilling(x: jax.Array) -> jax.Array:
    """x divided by its sum, with all of x in the registers of one warpgroup."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x_ref, o_ref):
        everything = plgpu.load(x_ref, layout=plgpu.Layout.WG_STRIDED(SHAPE, 4))
        o_ref[...] = everything / jnp.sum(everything)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x)


def aot_cases() -> list[AotCase]:
    """The one case, which `make test-aot` compiles first to see it refused."""
    return [AotCase("self-check", spilling, (jax.ShapeDtypeStruct(SHAPE, jnp.float32),), (FP8_MMA,))]
