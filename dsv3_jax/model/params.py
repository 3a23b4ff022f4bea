"""Values of the parameter tree: fresh ones, or only shapes, dtypes and logical axes."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.model.tree import Leaf, Tree, model_tree
from dsv3_jax.typing import Array, DType


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
    return draw(model_tree(cfg), key, std=cfg.init_std, dtype=dtype)


# XLA's default level compiles this five times as long (27 CPU-seconds for a tiny model), for the same running time.
_init_jitted = jax.jit(_init, static_argnames=("cfg", "dtype"), compiler_options={"xla_backend_optimization_level": 1})


def draw(tree: Tree | Leaf, key: jax.Array, *, std: float, dtype: DType) -> Any:
    """Fresh values of `tree`. Each depends on `key` and its path alone: a new leaf changes none of the others."""

    def value(path: Any, leaf: Leaf) -> Array:
        if leaf.init == "zeros":
            return jnp.zeros(leaf.shape, jnp.float32)
        if leaf.init == "ones":
            return jnp.ones(leaf.shape, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        of_leaf = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (std * jax.random.normal(of_leaf, leaf.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(value, tree)


def abstract_params(cfg: ModelConfig, dtype: DType = jnp.float32) -> dict:
    """The tree of `init` with a `ParamSpec` at each leaf. Allocates nothing: milliseconds for 671B."""

    def spec(leaf: Leaf) -> ParamSpec:
        return ParamSpec(leaf.shape, jnp.dtype(jnp.float32 if leaf.init == "zeros" else dtype), leaf.axes)

    return jax.tree.map(spec, model_tree(cfg))
