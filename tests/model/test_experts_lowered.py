"""V2-Lite's MoE layer lowered for CUDA, without a GPU: grouped products, no loop, no product with every expert."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config.load import load_config
from dsv3_jax.model.moe.few_tokens import stacked_experts
from dsv3_jax.model.moe.layer import moe
from dsv3_jax.precision.policy import BFLOAT16, get_policy
from dsv3_kernels import target

if jax.__version_info__ < target.OLDEST_PALLAS_JAX:
    pytest.skip("Pallas's kernels need a newer jax", allow_module_level=True)

CFG = load_config(Path(__file__).parents[2] / "configs" / "v2_lite_16b.py")
D, E, F = CFG.model.model_dim, CFG.model.moe.num_experts, CFG.model.moe.expert_dim


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def faults(function, *args) -> tuple[list[str], int]:
    """What a GPU should not be given, and how many kernels there are."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"(?:dot_general|ragged_dot).*: (\(.*)", text)
    masked = [types for types in products if re.search(rf"tensor<(\d+x)*{E}x\d+x\d+x", types)]
    return re.findall(r"stablehlo\.while", text) + masked, text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("batch", [(1, 16), (2, 4096)], ids=["few", "many"])
def test_layer_forward_and_backward(batch):
    params = {
        "router": {"w": shaped(D, E)},
        "experts": {"gate_up": shaped(E, D, 2, F), "down": shaped(E, F, D)},
        "shared": {"gate_up": shaped(D, 2, 2 * F), "down": shaped(2 * F, D)},
    }

    def loss(params, x):
        out, _, balance = moe(params, None, x, None, cfg=CFG.model.moe, policy=get_policy(CFG.precision))
        return out.astype(jnp.float32).sum() + balance

    wrong, kernels = faults(jax.grad(loss, argnums=(0, 1)), params, shaped(*batch, D))
    assert not wrong
    assert kernels == 6  # two products forward, and two backward of each


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_decoding_step(num_tokens):
    dtype, L = jnp.bfloat16, 26
    stack = {"gate_up": shaped(L, E, D, 2, F, dtype=dtype), "down": shaped(L, E, F, D, dtype=dtype)}
    tokens = (shaped(num_tokens, D, dtype=dtype), shaped(num_tokens, 6, dtype=jnp.int32), shaped(num_tokens, 6))

    def step(stack, layer, x, ids, weights):
        return stacked_experts(stack, layer, x, ids, weights, policy=BFLOAT16)

    wrong, kernels = faults(step, stack, shaped(dtype=jnp.int32), *tokens)
    assert not wrong
    assert kernels == 2
