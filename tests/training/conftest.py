"""A run so small that a step takes milliseconds."""

from pathlib import Path

import pytest

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import (
    AuxiliaryConfig,
    BatchConfig,
    LearningRateConfig,
    OutputConfig,
    TrainConfig,
)

CONFIG_FILE = Path(__file__).parent / "midget.py"


@pytest.fixture
def small() -> RunConfig:
    return small_config()


def small_config(**changes) -> RunConfig:
    """Two layers, one MTP module, 8 experts."""
    model = ModelConfig(
        vocab_size=64,
        model_dim=16,
        num_layers=2,
        num_dense_layers=1,
        ffn_dim=32,
        mla=MLAConfig(num_heads=2, q_latent_dim=8, kv_latent_dim=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
        moe=MoEConfig(num_experts=8, num_shared_experts=1, top_k=2, expert_dim=8, num_groups=2, groups_per_token=1),
        mtp_depth=1,
        max_position=64,
        yarn=None,
        init_std=0.1,
    )
    train = TrainConfig(
        seq_len=12,
        total_tokens=10_000,
        lr=LearningRateConfig(1e-2, 1e-3, 1e-4, 100, 5_000, 4_000, 500),
        batch=BatchConfig(start=4, full=4, ramp_tokens=0, micro=4),
        auxiliary=AuxiliaryConfig(bias_speed=0.01),
        output=OutputConfig(eval_every=0, checkpoint_every=0, tensorboard=False),
        ema_decay=0.9,
        remat="none",
        loss_chunk_size=5,
    )
    return RunConfig("small", model, DataConfig(), train)
