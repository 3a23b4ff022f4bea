"""The experts' feed-forward chunk by chunk: what a CPU runs.

What lies between reading a row and writing its result is done while the chunk is in cache, and a loop visits used
blocks only, so any load is exact and unused experts are not read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_kernels.routed_experts.reference import swiglu
from dsv3_kernels.varying import varying_as

CHUNK_ROWS = 512


def forward(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "M"],
    block_expert: Int[Array, "M_blocks"],
    *,
    max_rows: int,
    saves_hidden: bool,
) -> tuple[Array, ...]:
    """The result of each row; if asked, also its gate and up [M, 2F], for `backward`."""
    M, block_size = rows.shape[0], _block_size(rows, block_expert)
    gate_up = _joined(gate_up)

    def feed_forward(start, size, expert):
        hidden = _matmul(_rows(rows, start, size), _pick(gate_up, expert))
        weighted = swiglu(hidden) * _rows(weights, start, size)[:, None]
        return [_matmul(weighted.astype(rows.dtype), _pick(down, expert)), hidden][: 1 + saves_hidden]

    def write(start, size, expert, results):
        made = feed_forward(start, size, expert)
        return [_write(result, chunk, start) for result, chunk in zip(results, made, strict=True)]

    widths = [down.shape[2], gate_up.shape[2]][: 1 + saves_hidden]
    results = varying_as([jnp.zeros((M, width), rows.dtype) for width in widths], rows, gate_up, down, weights)
    if max_rows <= block_size:
        return tuple(_for_two_blocks(block_expert, block_size, feed_forward, results))
    return tuple(for_each_chunk(block_expert, block_size, write, results, max_rows=max_rows))


def backward(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "M"],
    block_expert: Int[Array, "M_blocks"],
    hidden: Float[Array, "M F2"],
    d_out: Float[Array, "M D"],
    *,
    max_rows: int,
) -> tuple[Array, Array, Array, Array]:
    """The gradients of rows, gate_up, down and weights.

    That of a weight is read off where it multiplies the hidden product, so no product is computed again.
    """
    shape, gate_up = gate_up.shape, _joined(gate_up)

    def feed_forward(start, size, expert, gradients):
        d_rows, d_weights, d_gate_up, d_down = gradients
        d_chunk = _rows(d_rows, start, size)  # what is still there: the gradient of the result
        weight = _rows(weights, start, size)[:, None]
        product, d_product = jax.vjp(swiglu, _rows(hidden, start, size).astype(jnp.float32))
        d_weighted = _matmul_transposed(d_chunk, _pick(down, expert))
        d_weights = _write(d_weights, (d_weighted * product).sum(axis=1), start)
        d_hidden = d_product(d_weighted * weight)[0].astype(rows.dtype)
        d_rows = _write(d_rows, _matmul_transposed(d_hidden, _pick(gate_up, expert)), start)
        d_down = _add_outer(d_down, expert, (product * weight).astype(rows.dtype), d_chunk)
        d_gate_up = _add_outer(d_gate_up, expert, _rows(rows, start, size), d_hidden)
        return d_rows, d_weights, d_gate_up, d_down

    zeros = (
        d_out,
        jnp.zeros(weights.shape, jnp.float32),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
    )
    zeros = varying_as(zeros, rows, gate_up, down, weights, hidden, d_out)
    block_size = _block_size(rows, block_expert)
    d_rows, d_weights, d_gate_up, d_down = for_each_chunk(
        block_expert, block_size, feed_forward, zeros, max_rows=max_rows
    )
    d_rows = _zero_unused(d_rows, block_expert, block_size)
    return d_rows, d_gate_up.reshape(shape).astype(gate_up.dtype), d_down.astype(down.dtype), d_weights


def for_each_chunk(
    block_expert: Int[Array, "M_blocks"],
    block_size: int,
    step: Callable[[Array, int, Array, Any], Any],
    carry: Any,
    *,
    max_rows: int,
) -> Any:
    """Folds step(first row, number of rows (static), expert, carry) over the chunks that cover all used blocks.

    Neighbouring blocks of one expert are one chunk, of a power of two of blocks up to `CHUNK_ROWS` rows: on CPU a GEMM
    of 64 rows runs at half the rate of one of 512. A run of n blocks becomes ⌊n/c⌋ chunks of the largest size c and the
    binary digits of the rest. Each size costs its own compiled loop, so few rows an expert (`max_rows`) need few.
    """
    blocks = block_expert.shape[0]
    largest = 1
    while largest * 2 <= min(-(-max_rows // block_size), max(CHUNK_ROWS // block_size, 1)):
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


def _for_two_blocks(
    block_expert: Int[Array, "M_blocks"],
    block_size: int,
    feed_forward: Callable[[Array, int, Array], list[Array]],
    results: list[Array],
) -> list[Array]:
    """Writes the results of blocks up to the last used one, two at a time so that two cores have work where a block is
    low. Of an odd number, the last block is computed twice; an unused one before it, as if of expert 0, for nothing.
    """
    index = jnp.arange(1, block_expert.shape[0] + 1, dtype=jnp.int32)
    end = jnp.where(block_expert >= 0, index, 0).max()

    def visit_two(i, results):
        two = [jnp.minimum(2 * i + j, end - 1) for j in range(2)]
        made = [feed_forward(block * block_size, block_size, jnp.maximum(block_expert[block], 0)) for block in two]
        for block, chunks in zip(two, made, strict=True):
            found = [jnp.where(block_expert[block] >= 0, chunk, 0) for chunk in chunks]
            results = [_write(result, chunk, block * block_size) for result, chunk in zip(results, found, strict=True)]
        return results

    return lax.fori_loop(0, (end + 1) // 2, visit_two, varying_as(results, block_expert))


def _zero_unused(rows: Float[Array, "M D"], block_expert: Int[Array, "M_blocks"], block_size: int) -> Array:
    """Rows of used blocks as they are, zeros in the others, in place."""
    unused = jnp.argsort(block_expert >= 0, stable=True).astype(jnp.int32)
    zeros = jnp.zeros((block_size, rows.shape[1]), rows.dtype)

    def clear(i, rows):
        return _write(rows, zeros, unused[i] * block_size)

    return lax.fori_loop(0, (block_expert < 0).sum(dtype=jnp.int32), clear, rows)


def _block_size(rows: Array, block_expert: Array) -> int:
    return rows.shape[0] // max(block_expert.shape[0], 1)


def _joined(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D F2"]:
    return gate_up.reshape(*gate_up.shape[:2], -1)


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
