"""The routed experts: SwiGLU over rows sorted by expert (report section 2.1.2).

`grouped_matmul` has the signature of a GPU grouped GEMM: contiguous blocks of rows, one expert id a block.
`expert_ffn` composes two of them; `routed_ffn` takes tokens instead of rows and does everything between reading a
token and weighting its result while the chunk is in cache.

Neighbouring blocks of one expert are multiplied together, in chunks of a power of two of blocks up to `CHUNK_ROWS`
rows: on CPU a GEMM of 64 rows runs at half the rate of one of 512. There is one loop for each chunk size, with a
trip count read from the data, so unused blocks cost nothing and any load is exact.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.model.moe.dispatch import BlockPlan, sum_pairs
from dsv3_jax.precision.plain import swiglu
from dsv3_jax.typing import Array, Float, Int

CHUNK_ROWS = 512

GroupedLinear = Callable[[Array, Array, Array], Array]
"""(rows [M, D], weights [E, D, F], block_expert [M / block]) -> [M, F]."""


def expert_ffn(
    rows: Float[Array, "M D"],
    params: Mapping[str, Array],
    block_expert: Int[Array, "M_blocks"],
    *,
    grouped_linear: GroupedLinear | None = None,
) -> Float[Array, "M D"]:
    """down · (silu(gate · row) ⊙ (up · row)) with the weights of the row's block's expert (FFN^(r) of eq. 12).

    `params`: gate_up [E, D, 2, F], down [E, F, D], cast to the dtype of `rows`, the compute dtype.
    `grouped_linear` defaults to `grouped_matmul`.
    """
    grouped_linear = grouped_linear or grouped_matmul
    gate_up, down = _weights_as(params, rows.dtype)
    gate_up_MX = grouped_linear(rows, gate_up, block_expert)
    return grouped_linear(swiglu(gate_up_MX), down, block_expert)


def routed_ffn(
    x: Float[Array, "N D"], params: Mapping[str, Array], weights: Float[Array, "N K"], plan: BlockPlan
) -> Float[Array, "N D"]:
    """Σ_k weight · FFN_expert(x) for the pairs that `plan` laid out: the routed part of eq. 12.

    Equals `combine_rows(expert_ffn(gather_rows(x, plan), params, plan.block_expert), weights, plan)`. Of the M rows
    the backward pass keeps gate and up only: tokens are gathered again, products made again, and the gradient of a
    weight is read off where it multiplies the hidden product, so the experts' outputs are not needed.
    """
    gate_up, down = _weights_as(params, x.dtype)
    return _routed(x, gate_up, down, weights, plan)


def grouped_matmul_reference(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], block_expert: Int[Array, "M_blocks"]
) -> Float[Array, "M F"]:
    """Row times the weight of its block's expert, zeros where that is -1: plain twin of `grouped_matmul`."""
    blocks = block_expert.shape[0]
    rows_mbd = rows.reshape(blocks, rows.shape[0] // blocks, rows.shape[1])
    picked_mdf = weights[jnp.maximum(block_expert, 0)] * (block_expert >= 0)[:, None, None].astype(weights.dtype)
    out = jnp.einsum("mbd,mdf->mbf", rows_mbd, picked_mdf, preferred_element_type=jnp.float32)
    return out.reshape(rows.shape[0], weights.shape[2]).astype(rows.dtype)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "M D"], weights: Float[Array, "E D F"], block_expert: Int[Array, "M_blocks"]
) -> Float[Array, "M F"]:
    """Row times the weight of its block's expert, zeros where that is -1.

    Equal ids must be neighbours for speed, not for correctness. The gradient of `weights` is summed in float32.
    """

    def multiply(start, size, expert, out):
        product = _matmul(_rows(rows, start, size), _pick(weights, expert))
        return _write(out, product, start)

    out = jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    return _for_each_chunk(block_expert, _block_size(rows, block_expert), multiply, out, num_tokens=rows.shape[0])


def _grouped_forward(rows, weights, block_expert):
    return grouped_matmul(rows, weights, block_expert), (rows, weights, block_expert)


def _grouped_backward(residuals, d_out):
    rows, weights, block_expert = residuals

    def multiply(start, size, expert, gradients):
        d_rows, d_weights = gradients
        d_chunk = _rows(d_out, start, size)
        d_rows = _write(d_rows, _matmul_transposed(d_chunk, _pick(weights, expert)), start)
        return d_rows, _add_outer(d_weights, expert, _rows(rows, start, size), d_chunk)

    zeros = (jnp.zeros_like(rows), jnp.zeros(weights.shape, jnp.float32))
    block_size = _block_size(rows, block_expert)
    d_rows, d_weights = _for_each_chunk(block_expert, block_size, multiply, zeros, num_tokens=rows.shape[0])
    return d_rows, d_weights.astype(weights.dtype), _no_gradient(block_expert)


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@jax.custom_vjp
def _routed(x, gate_up, down, weights, plan):
    return _run_routed(x, gate_up, down, weights, plan)[0]


def _routed_forward(x, gate_up, down, weights, plan):
    kept = jnp.zeros((plan.token_of.shape[0], gate_up.shape[2]), x.dtype)
    out, kept = _run_routed(x, gate_up, down, weights, plan, kept)
    return out, (x, gate_up, down, weights, plan, checkpoint_name(kept, "kept"))


def _run_routed(x, gate_up, down, weights, plan, *kept):
    """The result, followed by gate and up of every row if a buffer for them is given."""
    weight_M = _weight_of_row(weights, plan)

    def feed_forward(start, size, expert, outs):
        out, *kept = outs
        chunk_gate_up = _matmul(_tokens(x, plan, start, size), _pick(gate_up, expert))
        weighted = swiglu(chunk_gate_up) * _rows(weight_M, start, size)[:, None]
        chunk_out = _matmul(weighted.astype(x.dtype), _pick(down, expert))
        return _write(out, chunk_out, start), *[_write(buffer, chunk_gate_up, start) for buffer in kept]

    out = jnp.zeros((plan.token_of.shape[0], x.shape[1]), x.dtype)
    block_size = _block_size(plan.token_of, plan.block_expert)
    N = x.shape[0]
    out, *kept = _for_each_chunk(plan.block_expert, block_size, feed_forward, (out, *kept), num_tokens=N)
    return sum_pairs(out, plan), *kept


def _routed_backward(residuals, d_out):
    x, gate_up, down, weights, plan, kept = residuals
    weight_M = _weight_of_row(weights, plan)

    def feed_forward(start, size, expert, gradients):
        d_rows, d_weight_M, d_gate_up, d_down = gradients
        d_chunk = _tokens(d_out, plan, start, size)
        weight = _rows(weight_M, start, size)[:, None]
        product, d_product = jax.vjp(swiglu, _rows(kept, start, size).astype(jnp.float32))
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
    block_size = _block_size(plan.token_of, plan.block_expert)
    d_rows, d_weight_M, d_gate_up, d_down = _for_each_chunk(
        plan.block_expert, block_size, feed_forward, zeros, num_tokens=x.shape[0]
    )
    d_weights = d_weight_M[plan.slot_of].astype(weights.dtype)
    d_x, d_plan = sum_pairs(d_rows, plan), jax.tree.map(_no_gradient, plan)
    return d_x, d_gate_up.astype(gate_up.dtype), d_down.astype(down.dtype), d_weights, d_plan


_routed.defvjp(_routed_forward, _routed_backward)


def _for_each_chunk(
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


def _weight_of_row(weights: Float[Array, "N K"], plan: BlockPlan) -> Float[Array, "M"]:
    """The weight of each row's pair, zero where the row is padding."""
    return weights.astype(jnp.float32).reshape(-1).at[plan.pair_of].get(mode="fill", fill_value=0)


def _tokens(x: Float[Array, "N D"], plan: BlockPlan, start: Array, size: int) -> Float[Array, "m D"]:
    """The tokens of a chunk of rows; any token where the row is padding, as its weight is zero."""
    return x.at[_rows(plan.token_of, start, size)].get(mode="clip")


def _block_size(rows: Array, block_expert: Array) -> int:
    return rows.shape[0] // block_expert.shape[0]


def _weights_as(params: Mapping[str, Array], dtype: Any) -> tuple[Float[Array, "E D X"], Float[Array, "E F D"]]:
    gate_up = params["gate_up"]
    return gate_up.astype(dtype).reshape(*gate_up.shape[:2], -1), params["down"].astype(dtype)


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


def _no_gradient(ids: Array) -> np.ndarray:
    return np.zeros(ids.shape, jax.dtypes.float0)
