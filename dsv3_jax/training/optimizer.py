"""How a step moves what it trains: AdamW as the report uses it for parameters, ±γ for the routers' biases.

Clip by global norm, two moments, decay on matrices only.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.train import OptimizerConfig
from dsv3_jax.model.params import ParamSpec, abstract_params
from dsv3_jax.typing import Array, DType, Float, Int, Params


def make_optimizer(
    cfg: OptimizerConfig, model: ModelConfig, *, moment_dtype: DType = jnp.float32
) -> optax.GradientTransformation:
    """Makes of float32 gradients the direction that `apply_update` scales by the learning rate.

    `moment_dtype`: of a run, `RunConfig.moment_dtype`.
    """
    moments = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        _stored_as(moments, jnp.dtype(moment_dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask(model)),
    )


def decay_mask(model: ModelConfig) -> dict[str, Any]:
    """True for every matrix of the parameter tree, False for norms.

    A stack of norm scales has two dimensions too, so the leading layer axis does not count.
    """

    def is_matrix(spec: ParamSpec) -> bool:
        return sum(axis != "layers" for axis in spec.axes) >= 2

    specs = abstract_params(model)["params"]
    return jax.tree.map(is_matrix, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def apply_update(params: Params, direction: Params, learning_rate: Float[Array, ""]) -> Params:
    """params - learning_rate · direction, computed in float32, in the dtype of the parameters."""

    def move(param: Array, step: Array) -> Array:
        return (param.astype(jnp.float32) - learning_rate * step.astype(jnp.float32)).astype(param.dtype)

    return jax.tree.map(move, params, direction)


def update_bias(bias: Float[Array, "*L E"], load: Float[Array, "*L E"] | Int[Array, "*L E"], speed) -> Array:
    """Lowers the bias of overloaded experts by `speed` (γ) and raises that of underloaded ones (section 2.1.2).

    `load` counts the whole batch of one step, over all devices; at the mean an expert's bias stays.
    """
    load = load.astype(jnp.float32)
    error = load.mean(axis=-1, keepdims=True) - load
    return bias + jnp.asarray(speed, bias.dtype) * jnp.sign(error)


def router_biases(router_state: Params) -> Float[Array, "l E"]:
    """The biases of all routers: main MoE layers in order, then MTP modules. No rows where routing has no bias."""
    stacks = jax.tree.leaves(router_state)
    return jnp.concatenate(stacks) if stacks else jnp.zeros((0, 1), jnp.float32)


def with_router_biases(router_state: Params, biases: Float[Array, "l E"]) -> dict:
    """A tree like `router_state` that holds `biases`, in the order of `router_biases`."""
    stacks, treedef = jax.tree.flatten(router_state)
    ends = list(itertools.accumulate(len(stack) for stack in stacks))
    return treedef.unflatten(jnp.split(biases, ends[:-1])[: len(stacks)])


def _stored_as(inner: optax.GradientTransformation, dtype: DType) -> optax.GradientTransformation:
    """`inner` computing in float32 with its floating state stored in `dtype` between steps."""

    def cast(state: Any, target: DType) -> Any:
        return jax.tree.map(lambda x: x.astype(target) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # optax raises β to the int32 step count, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
