"""A run so small that a step takes milliseconds."""

from pathlib import Path

import pytest

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import (
    AuxiliaryConfig,
    BatchConfig,
    LearningRateConfig,
    OutputConfig,
    TrainConfig,
)
from tests.small import make_config

CONFIG_FILE = Path(__file__).parent / "midget.py"


@pytest.fixture
def small() -> RunConfig:
    return small_config()


def small_config() -> RunConfig:
    """The shared small model on rows of 12 tokens, four of them a step."""
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
    return RunConfig("small", make_config(num_layers=2, init_std=0.1), DataConfig(), train)


@pytest.fixture(autouse=True, scope="module")
def quickly(compile_quickly: None) -> None:
    """Every test here compiles quickly."""
