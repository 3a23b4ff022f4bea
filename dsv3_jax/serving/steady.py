"""Experts that multiply a row in the same way however many others chose its expert."""

import dataclasses
import functools

from dsv3_jax.model.functions import Functions
from dsv3_jax.model.moe import experts
from dsv3_jax.typing import Array, Float
from dsv3_kernels import expert_ffn as rows_ffn

MOST_ROWS = 32
"""Of a matmul: a CPU adds the terms of a dot product in one order for 2 to 32 rows, in another for 64 to 512."""


@functools.cache
def steady(functions: Functions) -> Functions:
    """`functions` with `steady_ffn` in the place of the plain experts; others decide themselves."""
    if functions.expert_ffn is not experts.expert_ffn:
        return functions
    return dataclasses.replace(functions, name=f"{functions.name}, steady", expert_ffn=steady_ffn)


def steady_ffn(
    gate_up: Float[Array, "E D 2 F"], down: Float[Array, "E F D"], dispatched: experts.Dispatched
) -> Float[Array, "M D"]:
    """`experts.expert_ffn`, of whose neighbouring blocks a CPU multiplies no more than `MOST_ROWS` rows at a time."""
    rows, weights, block_expert, plan, _ = dispatched
    w_in, w_out = gate_up.astype(rows.dtype), down.astype(rows.dtype)
    return rows_ffn(rows, w_in, w_out, weights, block_expert, max_rows=min(plan.slot_of.shape[0], MOST_ROWS))
