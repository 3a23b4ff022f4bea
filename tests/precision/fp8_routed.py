"""The three parts of the routed experts in FP8 composed on one device, for tests."""

from typing import Any

import jax.numpy as jnp

from dsv3_jax.precision.fp8_experts import BLOCK_ROWS, expert_ffn
from dsv3_jax.precision.gradient_tiles import Tile
from dsv3_jax.precision.wire import gather_payload, sum_payload_rows
from dsv3_kernels import plan_blocks, row_weights


def routed(x: Any, gate_up: Any, down: Any, weights: Any, ids: Any, *, gradient_tile: Tile = (1, 128)) -> Any:
    """Σ_k weight · FFN_expert(x) of bfloat16 tokens."""
    plan = plan_blocks(ids, len(down), block_size=BLOCK_ROWS)
    rows = gather_payload(x.astype(jnp.bfloat16), plan)
    rows = expert_ffn(rows, gate_up, down, row_weights(weights, plan), plan.block_expert, gradient_tile=gradient_tile)
    return sum_payload_rows(rows, plan, gradient_tile=gradient_tile)
