"""One run: everything that decides its result, and nothing else."""

import dataclasses
from typing import Literal

from dsv3_jax.config.check import check
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a file in `configs/` returns and what a checkpoint stores.

    `precision` names a policy of `dsv3_jax.precision.policy`. `seed` fixes the initial weights; data has its own.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    precision: Literal["float32", "bfloat16", "mixed"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            self.precision in ("float32", "bfloat16", "mixed"),
            f"precision={self.precision!r} is unknown; use 'float32', 'bfloat16' or 'mixed' (RunConfig.precision).",
        )
        check(0 <= self.seed < 2**31, f"seed={self.seed} is outside 0..2^31-1 (RunConfig.seed).")
