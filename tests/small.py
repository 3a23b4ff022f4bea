"""The small model that all folders of tests share, with nothing left at its initial value: every parameter matters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.model.params import abstract_params

BASE = ModelConfig(
    vocab_size=67,
    model_dim=20,
    num_layers=3,
    num_dense_layers=1,
    ffn_dim=26,
    mla=MLAConfig(num_heads=3, q_latent_dim=14, kv_latent_dim=10, nope_head_dim=7, rope_head_dim=6, v_head_dim=5),
    moe=MoEConfig(num_experts=6, num_shared_experts=1, top_k=3, expert_dim=9, num_groups=3, groups_per_token=2),
    mtp_depth=1,
    max_position=64,
    yarn=YarnConfig(factor=4.0, original_max_position=16),
    init_std=0.3,
)


def make_config(*, mla: dict | None = None, moe: dict | None = None, **changes) -> ModelConfig:
    """Three layers (one dense) of odd sizes, 6 experts in 3 groups, an MTP module; `changes` replace fields."""
    changes["mla"] = dataclasses.replace(BASE.mla, **(mla or {}))
    changes["moe"] = dataclasses.replace(BASE.moe, **(moe or {}))
    return dataclasses.replace(BASE, **changes)


def make_variables(cfg: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Weights N(0, init_std²), norms N(1, 0.2²), router biases N(-0.5, 0.3²)."""
    rng = np.random.default_rng(seed)

    def draw(path, spec) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.2) if "norm" in name else (-0.5, 0.3) if "bias" in name else (0.0, cfg.init_std)
        return jnp.asarray(rng.normal(mean, std, spec.shape), spec.dtype)

    return jax.tree_util.tree_map_with_path(
        draw, abstract_params(cfg, dtype), is_leaf=lambda leaf: hasattr(leaf, "axes")
    )
