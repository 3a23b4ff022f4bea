"""The parameter tree: fresh values, or only shapes, dtypes and logical axes."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.block import declare_dense_block, declare_moe_block
from dsv3_jax.model.embedding import Embedding, Unembedding
from dsv3_jax.model.mtp import declare_mtp_module
from dsv3_jax.model.norm import RMSNorm
from dsv3_jax.typing import DType


class ParamSpec(NamedTuple):
    """A leaf of the abstract tree; `axes` names each dimension for the sharding rules (None: never sharded)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


def init(cfg: ModelConfig, key: jax.Array, dtype: DType = jnp.float32) -> dict:
    """Fresh variables, `{"params": ..., "router_state": ...}`: plain nested dicts of arrays.

    Weights are N(0, init_std²), norms 1, router biases 0 (float32 whatever `dtype`). Stacks have a leading layer
    axis. Jitted: only the result is ever in memory.
    """
    key = jax.random.clone(key)  # traced whenever a caller's jit is, where compiler options may not be given
    draw = _init if isinstance(key, jax.core.Tracer) else _init_jitted
    return draw(key, cfg=cfg, dtype=jnp.dtype(dtype))


def _init(key: jax.Array, *, cfg: ModelConfig, dtype: jnp.dtype) -> dict:
    boxed = _declare_model(cfg, key)
    values = jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=_is_box)
    return {
        "params": jax.tree.map(lambda leaf: leaf.astype(dtype), values["params"]),
        "router_state": values["router_state"],
    }


# XLA's default level compiles this five times as long (27 CPU-seconds for a tiny model), for the same running time.
_init_jitted = jax.jit(_init, static_argnames=("cfg", "dtype"), compiler_options={"xla_backend_optimization_level": 1})


def abstract_params(cfg: ModelConfig, dtype: DType = jnp.float32) -> dict:
    """The tree of `init` with a `ParamSpec` at each leaf. Allocates nothing: a second for 671B."""
    boxed = jax.eval_shape(partial(_declare_model, cfg), jax.random.key(0))

    def spec(leaf: nn.Partitioned, leaf_dtype: DType) -> ParamSpec:
        shape = leaf.value.shape
        names = tuple(leaf.names)
        axes = ("layers",) * (len(shape) - len(names)) + names
        return ParamSpec(shape, jnp.dtype(leaf_dtype), axes)

    return {
        "params": jax.tree.map(lambda leaf: spec(leaf, dtype), boxed["params"], is_leaf=_is_box),
        "router_state": jax.tree.map(lambda leaf: spec(leaf, jnp.float32), boxed["router_state"], is_leaf=_is_box),
    }


def _is_box(leaf) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _declare_model(cfg: ModelConfig, key: jax.Array) -> dict:
    names = ("embed", "dense_layers", "moe_layers", "mtp", "final_norm", "unembed")
    keys: dict[str, jax.Array] = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    V, D = cfg.vocab_size, cfg.model_dim
    singles = {
        "embed": Embedding(V, D, cfg.init_std),
        "final_norm": RMSNorm(D, cfg.norm_eps),
        "unembed": Unembedding(V, D, cfg.init_std),
    }
    stacks = {
        "dense_layers": (declare_dense_block, cfg.num_dense_layers),
        "moe_layers": (declare_moe_block, cfg.num_moe_layers),
        "mtp": (declare_mtp_module, cfg.mtp_depth),
    }
    declared: dict = {"params": {}, "router_state": {}}
    for name, module in singles.items():
        declared["params"][name] = module.init(keys[name], method="weights")["params"]
    for name, (declare, count) in stacks.items():
        if count:
            stack = jax.vmap(partial(declare, cfg))(jax.random.split(keys[name], count))
            for collection, leaves in stack.items():
                declared[collection][name] = leaves
    return declared
