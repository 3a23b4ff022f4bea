"""The experts' feed-forward as it is written down, with the gradients of `jax.grad`: what to copy for one's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_ffn_reference(
    rows: Float[Array, "M D"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    weights: Float[Array, "M"],
    block_expert: Int[Array, "M_blocks"],
) -> Float[Array, "M D"]:
    """weight · down · (silu(gate · row) ⊙ (up · row)) with the weights of each row's expert, as `expert_ffn`."""
    E, D, _, F = gate_up.shape
    hidden = grouped_linear(rows, gate_up.reshape(E, D, 2 * F), block_expert).astype(jnp.float32)
    weighted = swiglu(hidden) * weights[:, None]
    return grouped_linear(weighted.astype(rows.dtype), down, block_expert)


def grouped_linear(
    rows: Float[Array, "M A"], w: Float[Array, "E A Z"], block_expert: Int[Array, "M_blocks"]
) -> Float[Array, "M Z"]:
    """Each block of rows times its expert's weights, which are copied for every block; zeros where a block has none."""
    blocks = block_expert.shape[0]
    rows_BbA = rows.reshape(blocks, rows.shape[0] // blocks, -1)
    out_BbZ = jnp.einsum("nba,naz->nbz", rows_BbA, w[jnp.maximum(block_expert, 0)], preferred_element_type=jnp.float32)
    out_BbZ = jnp.where((block_expert >= 0)[:, None, None], out_BbZ, 0)
    return out_BbZ.reshape(rows.shape[0], -1).astype(rows.dtype)


def swiglu(gate_up: Float[Array, "*M F2"]) -> Float[Array, "*M F"]:
    """silu(gate)·up, where the last axis holds all gates, then all ups (arXiv 2002.05202)."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
