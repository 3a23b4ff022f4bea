"""Small models to complete with, and their plain uncached completion."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.model.params import abstract_params
from dsv3_jax.model.transformer import forward

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
    eos_id=2,
)
CONFIGS = {
    "base": BASE,
    "no_q_latent": dataclasses.replace(
        BASE, mla=dataclasses.replace(BASE.mla, q_latent_dim=None), yarn=None, num_dense_layers=0, mtp_depth=0
    ),
    "softmax": dataclasses.replace(
        BASE,
        moe=MoEConfig(
            num_experts=5, num_shared_experts=0, top_k=2, expert_dim=9, num_groups=1, groups_per_token=1,
            score="softmax", normalize_weights=False, has_bias=False, scale=1.0,
        ),
    ),
    "dense": dataclasses.replace(BASE, num_dense_layers=3, mtp_depth=0),
}  # fmt: skip


def make_variables(cfg: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Weights N(0, init_std²), norms N(1, 0.2²), router biases N(-0.5, 0.3²)."""
    rng = np.random.default_rng(seed)

    def draw(path, spec) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.2) if "norm" in name else (-0.5, 0.3) if "bias" in name else (0.0, cfg.init_std)
        return jnp.asarray(rng.normal(mean, std, spec.shape), spec.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg, dtype), is_leaf=lambda x: hasattr(x, "axes"))


_logits = jax.jit(lambda cfg, variables, tokens: forward(cfg, variables, tokens).logits, static_argnums=0)
LONGEST = 48


def filled_up(rows: Sequence[Any]) -> np.ndarray:
    """Rows of any lengths as int32[B, LONGEST]: one shape, one compilation."""
    return np.stack([np.pad(np.asarray(row, np.int32), (0, LONGEST - len(row))) for row in rows])


def complete_slowly(
    cfg: ModelConfig, variables: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ids [B, max_new_tokens] and the logits that chose them, from whole uncached rows.

    Rows are filled up on the right, which a causal model does not see.
    """
    tokens = filled_up(prompts)
    ends = np.array([len(prompt) for prompt in prompts])
    rows, ids, chosen_by = np.arange(len(prompts)), [], []
    for _ in range(max_new_tokens):
        logits = np.asarray(_logits(cfg, variables, tokens))[rows, ends - 1]
        ids.append(logits.argmax(-1))
        chosen_by.append(logits)
        tokens[rows, ends] = ids[-1]
        ends += 1
    return np.stack(ids, 1), np.stack(chosen_by, 1)


@pytest.fixture(scope="session", params=CONFIGS)
def model(request) -> tuple[ModelConfig, dict[str, Any]]:
    """Each configuration with its variables."""
    cfg = CONFIGS[request.param]
    return cfg, make_variables(cfg)


@pytest.fixture(scope="session")
def base() -> tuple[ModelConfig, dict[str, Any]]:
    return BASE, make_variables(BASE)


@pytest.fixture(scope="session")
def slowly():
    return complete_slowly


@pytest.fixture(scope="session")
def uncached_logits():
    """Logits of rows of any lengths, [B, LONGEST, V]."""
    return lambda cfg, variables, rows: np.asarray(_logits(cfg, variables, filled_up(rows)))


@pytest.fixture(scope="session")
def variables_of():
    return make_variables


@pytest.fixture(scope="module", autouse=True)
def compile_quickly() -> Iterator[None]:
    """These tests compile much and compute little: without most optimisations they take half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
