"""Routed experts for the few tokens of a decoding step, read straight from the stack of all layers.

Sorting tokens into blocks pays off when an expert gets many rows. A decoding step has a handful, and its cost is
reading weights once: so either the chosen experts are gathered (very few pairs), or each expert that anybody chose
multiplies all rows. Slicing a layer out of the stack first would copy every expert, chosen or not. A GPU reads the
chosen experts where they lie in the stack (`grouped.few_tokens`): a loop over them would wait for the host.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dsv3_jax.model.moe import grouped
from dsv3_jax.precision.plain_linear import swiglu
from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Float, Int
from dsv3_kernels import dispatch

GATHER_PAIRS = 8
"""Up to this many (token, expert) pairs, gathering is faster on CPU (see `dsv3_jax/serving/README.md`)."""


def stacked_experts(
    stack: Mapping[str, Array],
    layer: Int[Array, ""],
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    policy: Policy,
) -> Float[Array, "N D"]:
    """Σ_k weight·FFN_expert(x), as `local_experts`, with `stack` {gate_up [L,E,D,2,F], down [L,E,F,D]}."""
    L, E, D, _, F = stack["gate_up"].shape
    gate_up = stack["gate_up"].reshape(L * E, D, 2 * F)
    down = stack["down"].reshape(L * E, F, D)
    x = x.astype(policy.compute_dtype)
    return dispatch.run(FEW_TOKENS, None, gate_up, down, layer * E, x, ids, weights.astype(x.dtype), num_experts=E)


def visit_chosen(gate_up, down, first, x, ids, weights, *, num_experts: int) -> Float[Array, "N D"]:
    """`gather_chosen` or `visit_used`, by the number of pairs."""
    compute = gather_chosen if ids.size <= GATHER_PAIRS else visit_used
    return compute(gate_up, down, first, x, ids, weights, num_experts=num_experts)


def gather_chosen(gate_up, down, first, x, ids, weights, *, num_experts: int) -> Float[Array, "N D"]:
    """Copies the weights of each chosen pair, then multiplies them in one batch."""
    N, K = ids.shape
    chosen = (first + ids).reshape(-1)
    x_PD = jnp.repeat(x, K, axis=0)
    hidden_PF = swiglu(jnp.einsum("pd,pdf->pf", x_PD, gate_up[chosen].astype(x.dtype)))
    out_PD = jnp.einsum("pf,pfd->pd", hidden_PF, down[chosen].astype(x.dtype))
    return (out_PD.reshape(N, K, -1) * weights[:, :, None]).sum(axis=1)


def visit_used(gate_up, down, first, x, ids, weights, *, num_experts: int) -> Float[Array, "N D"]:
    """Visits every expert that some token chose, two at a time so that two cores have work."""
    N, _ = ids.shape
    weights_NE = jnp.zeros((N, num_experts), x.dtype).at[jnp.arange(N)[:, None], ids].add(weights)
    is_used = jnp.zeros(num_experts, bool).at[ids].set(True)
    used_first = jnp.argsort(~is_used)
    num_used = is_used.sum()

    def visit(index):
        # past the last used expert this is an unused one, whose weights_NE are all zero
        expert = used_first[jnp.minimum(index, num_experts - 1)]
        is_new = index < num_experts
        gate_up_DF = jax.lax.dynamic_index_in_dim(gate_up, first + expert, keepdims=False).astype(x.dtype)
        down_FD = jax.lax.dynamic_index_in_dim(down, first + expert, keepdims=False).astype(x.dtype)
        return jnp.where(is_new, weights_NE[:, expert], 0)[:, None] * (swiglu(x @ gate_up_DF) @ down_FD)

    def visit_two(pair, out):
        return out + visit(2 * pair) + visit(2 * pair + 1)

    return jax.lax.fori_loop(0, (num_used + 1) // 2, visit_two, jnp.zeros_like(x))


def _refuses(gate_up: Array, down: Array, first: Array, x: Array, *others: Array, num_experts: int) -> str | None:
    """The grouped products of a Hopper GPU are of bfloat16; casting the stack would copy every expert."""
    if gate_up.dtype == x.dtype == jnp.bfloat16:
        return None
    return f"takes weights and tokens of bfloat16, not {gate_up.dtype} and {x.dtype}: serve in that"


FEW_TOKENS = dispatch.Op(
    "stacked_experts",
    reference=functools.partial(grouped.few_tokens, implementation="reference"),
    xla=visit_chosen,
    kernel=grouped.few_tokens,
    refuses=_refuses,
    axes="ldf lfd ... nd nk nk -> nd",
    no_gradient="{op} is for serving and has no gradient; use dsv3_jax.model.moe.layer.local_experts.",
)
