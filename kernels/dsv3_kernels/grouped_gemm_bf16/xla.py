"""The grouped GEMMs for any backend: one dense matmul of a block of rows at a time.

The number of steps is that of the blocks, known to the compiler. (`jax.lax.ragged_dot` multiplies all rows by every
group's weight on GPUs, and masks.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.varying import varying_as


def grouped_matmul(
    rows: Float[Array, "M A"],
    weights: Float[Array, "G _ _"],
    block_group: Int[Array, "M_blocks"],
    *,
    transposed: bool,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "M Z"]:
    """One step a block; a block that no group claims costs nothing."""
    Z = weights.shape[1 if transposed else 2]
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def block_rows(block: tuple[Array, Array]) -> Array:
        own, group = block
        return jax.lax.cond(
            group >= 0,
            lambda: jax.lax.dot_general(
                own,
                jax.lax.dynamic_index_in_dim(weights, group, keepdims=False),
                contracted,
                preferred_element_type=jnp.float32,
            ).astype(out_dtype),
            lambda: varying_as(jnp.zeros((own.shape[0], Z), out_dtype), rows, weights, block_group),
        )

    return jax.lax.map(block_rows, (_blocks(rows, block_group), block_group)).reshape(rows.shape[0], Z)


def grouped_matmul_k(
    a: Float[Array, "M A"],
    b: Float[Array, "M Z"],
    block_group: Int[Array, "M_blocks"],
    *,
    num_groups: int,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "G A Z"]:
    """One step a block, added to its group's float32 sum in place."""
    shape = (a.shape[1], b.shape[1])

    def add_block(sums: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        own_a, own_b, group = block
        product = jax.lax.cond(
            group >= 0,
            lambda: jax.lax.dot_general(own_a, own_b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32),
            lambda: varying_as(jnp.zeros(shape, jnp.float32), a, b, block_group),
        )
        return sums.at[jnp.maximum(group, 0)].add(product), None

    sums = varying_as(jnp.zeros((num_groups, *shape), jnp.float32), a, b, block_group)
    sums, _ = jax.lax.scan(add_block, sums, (_blocks(a, block_group), _blocks(b, block_group), block_group))
    return sums.astype(out_dtype)


def _blocks(x: Float[Array, "M A"], block_group: Array) -> Float[Array, "M_blocks m A"]:
    blocks = block_group.shape[0]
    return x.reshape(blocks, x.shape[0] // max(blocks, 1), x.shape[1])
