"""Tokens to rows, rows to tokens: each the transpose of the other, and both are gathers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_kernels.routed_experts.plan import BlockPlan
from dsv3_kernels.varying import varying_alike


def gather_rows(x: Float[Array, "N D"], plan: BlockPlan) -> Float[Array, "M D"]:
    """Row m of the result is the token of row m, zeros where the row is padding."""
    return _gather(*varying_alike(x, plan))


def sum_rows(rows: Float[Array, "M D"], plan: BlockPlan) -> Float[Array, "N D"]:
    """The sum of each token's rows, in float32, in the dtype of `rows`. A pair without a row adds nothing."""
    return _sum(*varying_alike(rows, plan))


def row_weights(weights: Float[Array, "N K"], plan: BlockPlan) -> Float[Array, "M"]:
    """The weight of each row's pair in float32, zero where the row is padding."""
    return _weigh(*varying_alike(weights.astype(jnp.float32), plan))


def no_gradient(integers: object) -> object:
    """What a `jax.custom_vjp` returns for arrays of integers, such as a plan."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), integers)


@jax.custom_vjp
def _gather(x, plan):
    return x.at[plan.token_of].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _sum(rows, plan):
    total = functools.reduce(jnp.add, [_found(rows, slot_N).astype(jnp.float32) for slot_N in plan.slot_of.T])
    return total.astype(rows.dtype)


@jax.custom_vjp
def _weigh(weights, plan):
    return _found(weights.reshape(-1), plan.pair_of)


def _found(x: Float[Array, "X *D"], at: Int[Array, "*batch"]) -> Float[Array, "..."]:
    """x[at], zero where `at` is X."""
    return x.at[at].get(mode="fill", fill_value=0)


_gather.defvjp(lambda x, plan: (_gather(x, plan), plan), lambda plan, d_rows: (_sum(d_rows, plan), no_gradient(plan)))
_sum.defvjp(lambda rows, plan: (_sum(rows, plan), plan), lambda plan, d_out: (_gather(d_out, plan), no_gradient(plan)))
_weigh.defvjp(
    lambda weights, plan: (_weigh(weights, plan), plan),
    lambda plan, d_row: (_found(d_row, plan.slot_of), no_gradient(plan)),
)
