"""The experts' feed-forward as matmuls of all rows at once, grouped by expert: what a GPU runs.

The same sums as in `loops`, which stay in a CPU's cache. Here every step goes over all M rows: two grouped matmuls,
and one more of each kind for each gradient. Weights are read as they are stored.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.grouped_gemm_bf16.api import grouped_matmul, grouped_matmul_k
from dsv3_kernels.routed_experts.plan import plan_blocks
from dsv3_kernels.routed_experts.reference import swiglu

TALL = 64
"""Rows of a block that the grouped matmuls of a GPU take at least, or a multiple."""


def forward(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "M"],
    block_expert: Int[Array, "M_blocks"],
    *,
    max_rows: int,
    saves_hidden: bool,
    implementation: str | None = None,
) -> tuple[Array, ...]:
    """The result of each row; if asked, also its gate and up [M, 2F], for `backward`."""
    tall = _in_tall_blocks(rows.shape[0], block_expert, down.shape[0], max_rows)
    experts = tall.block_expert
    hidden = grouped_matmul(tall.moved(rows), _joined(gate_up), experts, implementation=implementation)
    weighted = swiglu(hidden.astype(jnp.float32)) * tall.moved(weights)[:, None]
    out = grouped_matmul(weighted.astype(rows.dtype), down, experts, implementation=implementation)
    return tall.moved_back(out), *([tall.moved_back(hidden)] if saves_hidden else [])


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
    implementation: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The gradients of rows, gate_up, down and weights.

    That of a weight is read off where it multiplies the hidden product, so no product is computed again.
    """
    E = down.shape[0]
    tall = _in_tall_blocks(rows.shape[0], block_expert, E, max_rows)
    rows, d_out, weight = tall.moved(rows), tall.moved(d_out), tall.moved(weights)[:, None]

    def times_transposed(x: Array, w: Array) -> Array:
        return grouped_matmul(x, w, tall.block_expert, transposed=True, implementation=implementation)

    def weight_gradient(x: Array, d_y: Array, like: Array) -> Array:
        return grouped_matmul_k(
            x, d_y, tall.block_expert, num_groups=E, out_dtype=like.dtype, implementation=implementation
        )

    product, through_swiglu = jax.vjp(swiglu, tall.moved(hidden).astype(jnp.float32))
    d_weighted = times_transposed(d_out, down).astype(jnp.float32)
    d_hidden = through_swiglu(d_weighted * weight)[0].astype(rows.dtype)
    d_rows = times_transposed(d_hidden, _joined(gate_up))
    d_gate_up = weight_gradient(rows, d_hidden, gate_up).reshape(gate_up.shape)
    d_down = weight_gradient((product * weight).astype(rows.dtype), d_out, down)
    d_weights = (d_weighted * product).sum(axis=1)
    return tall.moved_back(d_rows), d_gate_up, d_down, tall.moved_back(d_weights)


class _Tall(NamedTuple):
    """Blocks of a multiple of 64 rows: how rows get there and back."""

    block_expert: Int[Array, "T_blocks"]
    moved: Callable[[Array], Array]
    moved_back: Callable[[Array], Array]


def _in_tall_blocks(M: int, block_expert: Int[Array, "M_blocks"], num_experts: int, max_rows: int) -> _Tall:
    """The blocks themselves, or as many of an expert's low ones beside each other as fit, padded with zeros."""
    blocks = block_expert.shape[0]
    low = M // max(blocks, 1)
    if low % TALL == 0:
        return _Tall(block_expert, lambda x: x, lambda x: x)
    beside = 1 if max_rows <= low else max(TALL // low, 1)
    padding = -beside * low % TALL
    if beside == 1:
        tall_expert, to_tall, to_low = block_expert, lambda x: x, lambda x: x
    else:
        of_blocks = plan_blocks(block_expert[:, None], num_experts, block_size=beside)
        tall_expert = of_blocks.block_expert
        to_tall = lambda x: x.at[of_blocks.token_of].get(mode="fill", fill_value=0)  # noqa: E731
        to_low = lambda x: x.at[of_blocks.slot_of[:, 0]].get(mode="fill", fill_value=0)  # noqa: E731

    def moved(x: Array) -> Array:
        x = to_tall(x.reshape(blocks, low, *x.shape[1:])).reshape(-1, beside * low, *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(-1, *x.shape[2:])

    def moved_back(x: Array) -> Array:
        x = x.reshape(-1, beside * low + padding, *x.shape[1:])[:, : beside * low]
        return to_low(x.reshape(-1, low, *x.shape[2:])).reshape(M, *x.shape[2:])

    return _Tall(tall_expert, moved, moved_back)


def _joined(gate_up: Float[Array, "E D 2 F"]) -> Float[Array, "E D F2"]:
    return gate_up.reshape(*gate_up.shape[:2], -1)
