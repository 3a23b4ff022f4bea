"""The routed experts chunk by chunk: what a CPU runs.

Everything between reading a token and weighting its result is done while the chunk is in cache. Neighbouring blocks of
one expert are multiplied together, in chunks of a power of two of blocks up to `CHUNK_ROWS` rows: on CPU a GEMM of 64
rows runs at half the rate of one of 512. There is one loop for each chunk size, with a trip count read from the data,
so unused blocks cost nothing and any load is exact.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.model.moe.dispatch import BlockPlan, sum_pairs, weight_of_row
from dsv3_jax.precision.plain_linear import swiglu
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels.varying import varying_as

CHUNK_ROWS = 512


def forward(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "N K"],
    plan: BlockPlan,
    *,
    keeps_hidden: bool,
) -> tuple[Array, ...]:
    """As `grouped.forward`. Neither gathered tokens nor the experts' outputs are kept."""
    kept = [jnp.zeros((plan.token_of.shape[0], gate_up.shape[2]), x.dtype)] if keeps_hidden else []
    weight_M = weight_of_row(weights, plan)

    def feed_forward(start, size, expert, outs):
        out, *kept = outs
        chunk_gate_up = _matmul(_tokens(x, plan, start, size), _pick(gate_up, expert))
        weighted = swiglu(chunk_gate_up) * _rows(weight_M, start, size)[:, None]
        chunk_out = _matmul(weighted.astype(x.dtype), _pick(down, expert))
        return _write(out, chunk_out, start), *[_write(buffer, chunk_gate_up, start) for buffer in kept]

    out = jnp.zeros((plan.token_of.shape[0], x.shape[1]), x.dtype)
    block_size = _block_size(plan)
    N = x.shape[0]
    out, *kept = for_each_chunk(plan.block_expert, block_size, feed_forward, (out, *kept), num_tokens=N)
    return sum_pairs(out, plan), *kept


def backward(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "E D F2"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "N K"],
    plan: BlockPlan,
    hidden: Float[Array, "M F2"],
    d_out: Float[Array, "N D"],
) -> tuple[Array, Array, Array, Array]:
    """As `grouped.backward`: the gradients of x, gate_up, down and weights."""
    weight_M = weight_of_row(weights, plan)

    def feed_forward(start, size, expert, gradients):
        d_rows, d_weight_M, d_gate_up, d_down = gradients
        d_chunk = _tokens(d_out, plan, start, size)
        weight = _rows(weight_M, start, size)[:, None]
        product, d_product = jax.vjp(swiglu, _rows(hidden, start, size).astype(jnp.float32))
        d_weighted = _matmul_transposed(d_chunk, _pick(down, expert))
        d_weight_M = _write(d_weight_M, (d_weighted * product).sum(axis=1), start)
        d_chunk_gate_up = d_product(d_weighted * weight)[0].astype(x.dtype)
        d_rows = _write(d_rows, _matmul_transposed(d_chunk_gate_up, _pick(gate_up, expert)), start)
        d_down = _add_outer(d_down, expert, (product * weight).astype(x.dtype), d_chunk)
        d_gate_up = _add_outer(d_gate_up, expert, _tokens(x, plan, start, size), d_chunk_gate_up)
        return d_rows, d_weight_M, d_gate_up, d_down

    M = plan.token_of.shape[0]
    zeros = (
        jnp.zeros((M, x.shape[1]), x.dtype),
        jnp.zeros(M, jnp.float32),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
    )
    block_size = _block_size(plan)
    d_rows, d_weight_M, d_gate_up, d_down = for_each_chunk(
        plan.block_expert, block_size, feed_forward, zeros, num_tokens=x.shape[0]
    )
    d_weights = d_weight_M[plan.slot_of].astype(weights.dtype)
    return sum_pairs(d_rows, plan), d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype), d_weights


def for_each_chunk(
    block_expert: Int[Array, "M_blocks"],
    block_size: int,
    step: Callable[[Array, int, Array, Any], Any],
    carry: Any,
    *,
    num_tokens: int,
) -> Any:
    """Folds step(first row, number of rows (static), expert, carry) over the chunks that cover all used blocks.

    A run of n blocks of one expert becomes ⌊n/c⌋ chunks of the largest size c and the binary digits of the rest.
    An expert gets at most `num_tokens` rows, so few tokens need few sizes; each costs its own compiled loop.
    """
    blocks = block_expert.shape[0]
    largest = 1
    while largest * 2 <= min(-(-num_tokens // block_size), max(CHUNK_ROWS // block_size, 1)):
        largest *= 2
    index = jnp.arange(blocks, dtype=jnp.int32)
    changes = block_expert[1:] != block_expert[:-1]
    edge = jnp.ones(1, bool)
    run_start = lax.cummax(jnp.where(jnp.concatenate([edge, changes]), index, 0))
    run_end = lax.cummin(jnp.where(jnp.concatenate([changes, edge]), index + 1, blocks), reverse=True)
    run, position = run_end - run_start, index - run_start
    carry = varying_as(carry, block_expert)
    size = largest
    while size >= 1:
        if size == largest:
            starts_chunk = (position % size == 0) & (position + size <= run)
        else:
            starts_chunk = (run & size != 0) & (position == run - run % (2 * size))
        starts_chunk &= block_expert >= 0
        first_blocks = jnp.argsort(~starts_chunk, stable=True).astype(jnp.int32)

        def visit(i, carry, first_blocks=first_blocks, rows=size * block_size):
            block = first_blocks[i]
            return step(block * block_size, rows, block_expert[block], carry)

        carry = lax.fori_loop(0, starts_chunk.sum(dtype=jnp.int32), visit, carry)
        size //= 2
    return carry


def _tokens(x: Float[Array, "N D"], plan: BlockPlan, start: Array, size: int) -> Float[Array, "m D"]:
    """The tokens of a chunk of rows; any token where the row is padding, as its weight is zero."""
    return x.at[_rows(plan.token_of, start, size)].get(mode="clip")


def _block_size(plan: BlockPlan) -> int:
    return plan.token_of.shape[0] // plan.block_expert.shape[0]


def _matmul(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _matmul_transposed(x: Array, w: Array) -> Array:
    """x · wᵀ"""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _add_outer(total: Float[Array, "E D F"], expert: Array, x: Array, d_out: Array) -> Float[Array, "E D F"]:
    """total with xᵀ · d_out added to one expert."""
    outer = lax.dot_general(x, d_out, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.dynamic_update_index_in_dim(total, _pick(total, expert) + outer, expert, 0)


def _pick(weights: Float[Array, "E D F"], expert: Array) -> Float[Array, "D F"]:
    return lax.dynamic_index_in_dim(weights, expert, 0, keepdims=False)


def _rows(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, 0)


def _write(out: Array, chunk: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(out, chunk.astype(out.dtype), start, 0)
