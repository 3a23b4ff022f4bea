"""One run: everything that decides its result, and nothing else."""

import dataclasses
from typing import Literal, get_args

from dsv3_jax.config.check import check, check_finite
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.mesh_rules import check_mesh
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.train import TrainConfig

Precision = Literal["float32", "bfloat16", "mixed", "fp8_dsv3"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a file in `configs/` returns and what a checkpoint stores.

    `precision` is what `functions_for` takes: "float32"; "bfloat16"; "mixed", float32 parameters and bfloat16
    arithmetic; "fp8_dsv3", the same with projections and experts multiplied in FP8. `seed` fixes the initial weights;
    data has its own. `parallel` says how the run is spread over devices, and changes nothing of what it learns.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    precision: Precision = "float32"
    seed: int = 0
    parallel: ParallelConfig = ParallelConfig()  # noqa: RUF009 - it is frozen

    def __post_init__(self) -> None:
        check_finite(self)
        check(
            self.precision in get_args(Precision),
            f"precision={self.precision!r} is unknown; use one of {', '.join(get_args(Precision))} "
            "(RunConfig.precision).",
        )
        check(
            self.name.strip() != "" and self.name.isprintable(),
            f"name={self.name!r} cannot be printed as a title; give a word (RunConfig.name).",
        )
        check(
            self.model.eos_id is not None,
            "model.eos_id is none, but training ends each text with a token; set model.eos_id (RunConfig.model).",
        )
        check(
            self.train.seq_len <= self.model.max_position,
            f"train.seq_len={self.train.seq_len} exceeds model.max_position={self.model.max_position}, the positions "
            "that an exported model admits to; shorten the rows or raise model.max_position (RunConfig).",
        )
        check(0 <= self.seed < 2**31, f"seed={self.seed} is outside 0..2^31-1 (RunConfig.seed).")
        check_mesh(self.parallel, model=self.model, train=self.train, precision=self.precision)

    @property
    def moment_dtype(self) -> Literal["float32", "bfloat16"]:
        """How Adam's moments are stored: what `train.optimizer.moment_dtype` says, or the precision's recipe."""
        chosen = self.train.optimizer.moment_dtype
        if chosen != "recipe":
            return chosen
        return "bfloat16" if self.precision == "fp8_dsv3" else "float32"
