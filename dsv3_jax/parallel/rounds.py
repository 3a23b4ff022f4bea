"""Work in rounds of bounded size, of which the first is nearly always all.

Shapes are static, so room for the worst load would be memory for the worst load. What finds no room in the first round
is done in further ones, by a loop that usually runs no time at all.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels.routed_experts.rows import no_gradient
from dsv3_kernels.varying import varying_as

Round = Callable[..., tuple[Array, Array]]
"""round(index, params, x [N, D], ids, weights, *, is_first) -> what it adds to the result [N, D], choices dropped."""


def in_rounds(
    one_round: Round,
    num_rounds: Int[Array, ""],
    params: Any,
    x: Array,
    ids: Array,
    weights: Array,
    *,
    is_first: bool = True,
) -> tuple[Float[Array, "N D"], Int[Array, ""]]:
    """Sums of the rounds 0 … num_rounds - 1, in float32 and given in the dtype of x; differentiable but for ids.

    The backward pass of the first round has what was saved of it. It computes the further ones again, their
    collectives too: memory for what they would save is needed whether they run or not. Devices that meet in a
    collective of a round must have the same `num_rounds`.

    `is_first`: False inside a further round of other work. Then all rounds are further ones: compiled once.
    """
    if not is_first:
        out, dropped, _ = _further(one_round, 0, num_rounds, (params, x, weights), ids)
        return out.astype(x.dtype), dropped
    further, dropped, (params, x, weights) = _further(one_round, 1, num_rounds, (params, x, weights), ids)
    out, dropped_at_first = one_round(jnp.int32(0), params, x, ids, weights, is_first=True)
    return (out.astype(jnp.float32) + further).astype(x.dtype), dropped_at_first + dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further(one_round, begin, num_rounds, operands, ids):
    """Sums of the rounds from `begin` on, and the operands as they are: the first round takes these, so that further
    rounds add their gradients to those of the first, in place, instead of making their own.
    """
    params, x, weights = operands

    def add(index, sums):
        out, dropped = one_round(index, params, x, ids, weights, is_first=False)
        return sums[0] + out.astype(jnp.float32), sums[1] + dropped

    zeros = varying_as((jnp.zeros(x.shape, jnp.float32), jnp.int32(0)), operands, ids)
    return *lax.fori_loop(begin, num_rounds, add, zeros), operands


def _further_forward(one_round, begin, num_rounds, operands, ids):
    return _further(one_round, begin, num_rounds, operands, ids), (num_rounds, operands, ids)


def _further_backward(one_round, begin, residuals, gradients):
    num_rounds, operands, ids = residuals
    d_out, _, of_first = gradients

    def add(index, totals):
        def out_of(params, x, weights):
            return one_round(index, params, x, ids, weights, is_first=False)[0]

        out, through = jax.vjp(out_of, *operands)
        return jax.tree.map(lambda total, d: total + d.astype(jnp.float32), totals, through(d_out.astype(out.dtype)))

    wide = jax.tree.map(lambda d: d.astype(jnp.float32), of_first)
    totals = lax.fori_loop(begin, num_rounds, add, wide)
    d_operands = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), totals, operands)
    return no_gradient(num_rounds), d_operands, no_gradient(ids)


_further.defvjp(_further_forward, _further_backward)
