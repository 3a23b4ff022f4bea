"""How a model is trained: the report's schedules in tokens, its optimizer, and what a run writes.

The defaults are the report's recipe for the 671B model (section 4.2); values the report leaves open say so.
Lengths are tokens (batch tokens = sequences x sequence length), cadences are optimizer steps.
"""

import dataclasses
from typing import Literal

from dsv3_jax.config.check import check, check_finite


@dataclasses.dataclass(frozen=True)
class LearningRateConfig:
    """Five phases: linear warm-up, constant, cosine, low, final (report section 4.2).

    0 -> `peak` over `warmup_tokens`, `peak` until `constant_until_tokens`, cosine to `low` over `cosine_tokens`,
    `low` for `low_tokens`, `final` afterwards. The report warms up for 2K steps, which with the batch ramp of
    `BatchConfig` see 28.1e9 tokens.
    """

    peak: float = 2.2e-4
    low: float = 2.2e-5
    final: float = 7.3e-6
    warmup_tokens: int = 28_100_000_000
    constant_until_tokens: int = 10_000_000_000_000
    cosine_tokens: int = 4_300_000_000_000
    low_tokens: int = 333_000_000_000

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("peak", "low", "final", "warmup_tokens", "cosine_tokens", "low_tokens"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative (LearningRateConfig.{name}).")
        check(
            self.warmup_tokens <= self.constant_until_tokens,
            f"warmup_tokens={self.warmup_tokens} ends after constant_until_tokens={self.constant_until_tokens}; "
            "shorten the warm-up (LearningRateConfig).",
        )
        check(
            self.final <= self.low <= self.peak,
            f"rates must fall: peak={self.peak}, low={self.low}, final={self.final} (LearningRateConfig).",
        )


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Sequences an optimizer step: `start` at token 0, `full` from `ramp_tokens` on.

    The report gives the ends (3072, 15360) and the length (469B tokens), not the shape: here it is linear in tokens,
    rounded to whole micro-batches of `micro` sequences, which are accumulated one after another. Nor does it give
    the micro-batch: 128 is one sequence on each of the 128 data-parallel ranks of its 2048 GPUs in 16 stages
    (section 3.2), so a step has 24 to 120.
    """

    start: int = 3072
    full: int = 15360
    ramp_tokens: int = 469_000_000_000
    micro: int = 128

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("start", "full", "micro"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (BatchConfig.{name}).")
        for name in ("start", "full"):
            check(
                getattr(self, name) % self.micro == 0,
                f"{name}={getattr(self, name)} sequences are not whole micro-batches of micro={self.micro}; "
                f"use a multiple of {self.micro} (BatchConfig).",
            )
        check(self.start <= self.full, f"start={self.start} exceeds full={self.full} (BatchConfig).")
        check(self.ramp_tokens >= 0, f"ramp_tokens={self.ramp_tokens} is negative (BatchConfig).")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled decay on matrices only, after clipping by global norm (report section 4.2).

    `epsilon` is not in the report. `moment_dtype`: how both moments are stored; "recipe" is bfloat16 with
    precision=fp8_dsv3, as in the report, and float32 with any other.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["recipe", "float32", "bfloat16"] = "recipe"

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is outside [0, 1) (OptimizerConfig).")
        for name in ("epsilon", "clip_norm"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (OptimizerConfig.{name}).")
        check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} is negative (OptimizerConfig).")
        check(
            self.moment_dtype in ("recipe", "float32", "bfloat16"),
            f"moment_dtype={self.moment_dtype!r} is unknown; use 'recipe', 'float32' or 'bfloat16' (OptimizerConfig).",
        )


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig:
    """Weights beside the main loss, by tokens (report sections 2.1.2, 2.2, 4.2).

    Paper symbols: λ `mtp_weight` until `mtp_switch_tokens`, then `mtp_weight_late`; γ `bias_speed` until
    `bias_stop_tokens`, then 0; α `balance_weight`.
    """

    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_switch_tokens: int = 10_000_000_000_000
    bias_speed: float = 0.001
    bias_stop_tokens: int = 14_300_000_000_000
    balance_weight: float = 1e-4

    def __post_init__(self) -> None:
        check_finite(self)
        for field in dataclasses.fields(self):
            check(
                getattr(self, field.name) >= 0,
                f"{field.name}={getattr(self, field.name)} is negative (AuxiliaryConfig.{field.name}).",
            )


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """What a run writes and how often; cadences in steps, 0 = never.

    `eval_batches` held-out batches are scored during training, at most `final_eval_batches` at its end; 0 = none, so
    no evaluation. They come in an order drawn once, so the first of them are a fair sample of all held-out text.
    Changing any of these (or `total_tokens`) on resume is allowed: none of them alters the weights.
    """

    log_every: int = 1
    eval_every: int = 1000
    eval_batches: int = 64
    final_eval_batches: int = 2000
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    tensorboard: bool = True
    sample_prompt: str = "def "
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        check_finite(self)
        check(self.log_every > 0, f"log_every={self.log_every} must be at least 1 (OutputConfig).")
        check(self.keep_checkpoints > 0, f"keep_checkpoints={self.keep_checkpoints} must be at least 1 (OutputConfig).")
        for name in ("eval_every", "eval_batches", "final_eval_batches", "checkpoint_every", "sample_tokens"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative; 0 = never (OutputConfig).")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    A row has `seq_len` tokens. `total_tokens` is where the run stops; the schedules do not depend on it.
    `ema_decay` (0 = no average) and `ema_every` steps rule the average of the parameters on the host, which starts at
    the first update; the report has one, its decay is not stated.
    `remat`: what the backward pass reads from memory: "none" everything, "paper" what large matmuls gave (report
    section 3.2.3), "offload" the same from the host's memory, "received" each layer's input and what other devices sent
    to its experts, "full" each layer's input; the rest it computes again.
    `loss_chunk_size`: positions of every row whose logits exist at once.
    """

    seq_len: int = 4096
    total_tokens: int = 14_800_000_000_000
    lr: LearningRateConfig = LearningRateConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    output: OutputConfig = OutputConfig()
    ema_decay: float = 0.999
    ema_every: int = 1
    remat: Literal["none", "paper", "received", "full", "offload"] = "paper"
    loss_chunk_size: int = 512

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("seq_len", "total_tokens", "ema_every", "loss_chunk_size"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive (TrainConfig.{name}).")
        check(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} is outside [0, 1); 0 = none (TrainConfig).")
        check(
            self.remat in ("none", "paper", "received", "full", "offload"),
            f"remat={self.remat!r} is unknown; use 'none', 'paper', 'received', 'full' or 'offload' "
            "(TrainConfig.remat).",
        )
