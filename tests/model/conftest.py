"""Small models with nothing left at its initial value, so that every parameter matters to every test."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.model.params import abstract_params
from dsv3_jax.model.transformer import forward

MakeConfig = Callable[..., ModelConfig]
MakeVariables = Callable[..., dict[str, Any]]


def make_config(*, mla: dict | None = None, moe: dict | None = None, **changes) -> ModelConfig:
    """Three layers (one dense) of odd sizes, 6 experts in 3 groups; `changes` replace fields."""
    base = ModelConfig(
        vocab_size=61,
        model_dim=20,
        num_layers=3,
        num_dense_layers=1,
        ffn_dim=26,
        mla=MLAConfig(num_heads=3, q_latent_dim=14, kv_latent_dim=10, nope_head_dim=7, rope_head_dim=6, v_head_dim=5),
        moe=MoEConfig(num_experts=6, num_shared_experts=1, top_k=3, expert_dim=9, num_groups=3, groups_per_token=2),
        mtp_depth=1,
        max_position=128,
        yarn=YarnConfig(factor=4.0, original_max_position=16),
        init_std=0.25,
        eos_id=2,
    )
    changes["mla"] = dataclasses.replace(base.mla, **(mla or {}))
    changes["moe"] = dataclasses.replace(base.moe, **(moe or {}))
    return dataclasses.replace(base, **changes)


def make_variables(cfg: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Weights N(0, init_std²), norms N(1, 0.2²), router biases N(-0.5, 0.3²)."""
    rng = np.random.default_rng(seed)

    def draw(path, spec) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.2) if "norm" in name else (-0.5, 0.3) if "bias" in name else (0.0, cfg.init_std)
        return jnp.asarray(rng.normal(mean, std, spec.shape), spec.dtype)

    is_spec = lambda leaf: hasattr(leaf, "axes")  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg, dtype), is_leaf=is_spec)


@pytest.fixture(scope="session")
def config() -> MakeConfig:
    return make_config


@pytest.fixture(scope="session")
def variables_of() -> MakeVariables:
    return make_variables


_forward = jax.jit(forward, static_argnames=("cfg", "policy", "attend", "route", "experts"))


@pytest.fixture(scope="session")
def run_forward():
    """`forward`, compiled once for each configuration and shape in a whole test session."""
    return _forward


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    """These tests compile much and compute little: without most optimisations they take half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
