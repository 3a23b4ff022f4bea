"""The grouped GEMMs by their definitions: every group's dense matmul in float32, and the rows that are its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    rows: Float[Array, "M A"],
    weights: Float[Array, "G _ _"],
    block_group: Int[Array, "M_blocks"],
    *,
    transposed: bool,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "M Z"]:
    """Rows of block i are those of rows · weights[block_group[i]] (of its transpose); zeros where no group is named."""
    row_group = _of_rows(block_group, rows.shape[0])
    out = jnp.zeros((rows.shape[0], weights.shape[1 if transposed else 2]), jnp.float32)
    for group in range(weights.shape[0]):
        weight = weights[group].T if transposed else weights[group]
        product = jnp.dot(rows.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
        out = jnp.where((row_group == group)[:, None], product, out)
    return out.astype(out_dtype)


def grouped_matmul_k(
    a: Float[Array, "M A"],
    b: Float[Array, "M Z"],
    block_group: Int[Array, "M_blocks"],
    *,
    num_groups: int,
    out_dtype: jax.typing.DTypeLike,
) -> Float[Array, "G A Z"]:
    """out[g] is aᵀ · b over the rows of the blocks of g."""
    row_group = _of_rows(block_group, a.shape[0])
    sums = []
    for group in range(num_groups):
        is_own = (row_group == group)[:, None]
        own_a = jnp.where(is_own, a.astype(jnp.float32), 0.0)
        own_b = jnp.where(is_own, b.astype(jnp.float32), 0.0)
        sums.append(jnp.dot(own_a.T, own_b, precision="highest"))
    return jnp.stack(sums).astype(out_dtype)


def _of_rows(block_group: Array, num_rows: int) -> Array:
    return jnp.repeat(block_group, num_rows // max(block_group.shape[0], 1), total_repeat_length=num_rows)
