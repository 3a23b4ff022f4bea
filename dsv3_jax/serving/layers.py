"""The layers of a serving step, scanned with the cache as their carry."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.block import Mix, Parts, dense_block, moe_block
from dsv3_jax.model.moe.layer import local_experts
from dsv3_jax.model.params import stack_bias
from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Bool, Float, Int, Params, Variables

StackedExperts = Callable[..., Float[Array, "N D"]]
"""(experts of all layers, layer, x, ids, weights, policy=…) -> what the routed experts add."""


def scan_layers(
    cfg: ModelConfig,
    variables: Variables,
    x: Float[Array, "B T D"],
    cache: Any,
    mix_into: Callable[[Any, Int[Array, ""]], Mix],
    *,
    experts: StackedExperts,
    policy: Policy,
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """All layers but embedding, final norm and head. Returns (x, cache).

    `mix_into(cache, layer)` is the attention of one layer, and returns the cache with the new tokens' rows; dense
    layers come first. `variables` come from `decoding_weights`.
    """
    params, parts = variables["params"], Parts(policy)

    def dense_step(carry, layer_and_params):
        x, cache = carry
        layer, layer_params = layer_and_params
        return dense_block(layer_params, x, mix_into(cache, layer), cfg=cfg, parts=parts), None

    def moe_step(carry, layer_and_params):
        x, cache = carry
        index, layer_params, bias = layer_and_params

        def experts_of_layer(stack, x, ids, weights, *, policy):
            return experts(stack, index, x, ids, weights, policy=policy)

        layer_params = {**layer_params, "moe": {**layer_params["moe"], "experts": expert_stack}}
        mix = mix_into(cache, cfg.num_dense_layers + index)
        layer_parts = parts._replace(experts=experts_of_layer)
        x, cache, _, _ = moe_block(layer_params, bias, x, valid, mix, cfg=cfg, parts=layer_parts)
        return (x, cache), None

    carry = (x, cache)
    if cfg.num_dense_layers:
        layer_ids = jnp.arange(cfg.num_dense_layers, dtype=jnp.int32)
        carry, _ = jax.lax.scan(dense_step, carry, (layer_ids, params["dense_layers"]))
    if cfg.num_moe_layers:
        # The experts stay out of the scan: slicing them layer by layer would copy all, chosen or not.
        expert_stack = params["moe_layers"]["moe"]["experts"]
        rest = dict(params["moe_layers"])
        rest["moe"] = {name: leaf for name, leaf in rest["moe"].items() if name != "experts"}
        layer_ids = jnp.arange(cfg.num_moe_layers, dtype=jnp.int32)
        biases = stack_bias(variables.get("router_state", {}), "moe_layers")
        carry, _ = jax.lax.scan(moe_step, carry, (layer_ids, rest, biases))
    return carry


def sliced_experts(
    stack: Params,
    layer: Int[Array, ""],
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    *,
    policy: Policy,
) -> Float[Array, "N D"]:
    """`local_experts` of one layer, for steps with so many tokens that every expert is read anyway."""
    of_layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)
    return local_experts(of_layer, x, ids, weights, policy=policy)
