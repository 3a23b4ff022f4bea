"""V2-Lite's routed experts lowered for CUDA, without a GPU: grouped matmuls, no loop, no matmul with every expert."""

import re

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import expert_ffn, gather_rows, plan_blocks, plan_few, row_weights, sum_rows, target

if jax.__version_info__ < target.OLDEST_PALLAS_JAX:
    pytest.skip("Pallas's kernels need a newer jax", allow_module_level=True)

D, E, F, K = 2048, 64, 1408, 6


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def faults(function, *args) -> tuple[list[str], int]:
    """What a GPU should not be given, and how many kernels there are."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"(?:dot_general|ragged_dot).*: (\(.*)", text)
    masked = [types for types in products if re.search(rf"tensor<(\d+x)*{E}x\d+x\d+x", types)]
    return re.findall(r"stablehlo\.while", text) + masked, text.count("custom_call @mosaic_gpu")


def routed(planned, x, gate_up, down, weights, ids, first):
    plan = planned(ids, E)
    experts = jnp.where(plan.block_expert < 0, -1, plan.block_expert + first)
    rows, weight = gather_rows(x, plan), row_weights(weights, plan)
    return sum_rows(expert_ffn(rows, gate_up, down, weight, experts, max_rows=len(x)), plan)


def arguments(N, experts):
    choices = shaped(N, K, dtype=jnp.float32), shaped(N, K, dtype=jnp.int32)
    return shaped(N, D), shaped(experts, D, 2, F), shaped(experts, F, D), *choices, shaped(dtype=jnp.int32)


@pytest.mark.parametrize("N", [16, 8192], ids=["few", "many"])
def test_forward_and_backward(N):
    def loss(*given):
        return routed(plan_blocks, *given).astype(jnp.float32).sum()

    wrong, kernels = faults(jax.grad(loss, argnums=(0, 1, 2, 3)), *arguments(N, E))
    assert not wrong
    assert kernels == 6  # two products forward, and two backward of each


@pytest.mark.parametrize("N", [1, 16])
def test_a_decoding_step_in_a_stack_of_all_layers(N):
    wrong, kernels = faults(lambda *given: routed(plan_few, *given), *arguments(N, 26 * E))
    assert not wrong
    assert kernels == 2
