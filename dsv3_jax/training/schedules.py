"""The report's schedules as functions of tokens (section 4.2).

Token counts are Python integers, because 14.8e12 does not fit 32 bits; results are Python floats, handed to the
compiled step as scalars. "At token t" means: for the step after which t tokens have been seen.
"""

import math

import numpy as np

from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, TrainConfig
from dsv3_jax.training.step import Rates


def rates_at(tokens: int, cfg: TrainConfig) -> Rates:
    """The schedules' values for the step that ends at `tokens`."""
    return Rates(
        learning_rate=np.float32(learning_rate(tokens, cfg.lr)),
        mtp_weight=np.float32(mtp_weight(tokens, cfg.auxiliary)),
        bias_speed=np.float32(bias_speed(tokens, cfg.auxiliary)),
    )


def learning_rate(tokens: int, cfg: LearningRateConfig) -> float:
    """The rate of the step that ends at `tokens`: warm-up, constant, cosine, low, final."""
    if tokens < cfg.warmup_tokens:
        return cfg.peak * tokens / cfg.warmup_tokens
    into_cosine = tokens - cfg.constant_until_tokens
    if into_cosine <= 0:
        return cfg.peak
    if into_cosine < cfg.cosine_tokens:
        return cfg.low + (cfg.peak - cfg.low) * 0.5 * (1.0 + math.cos(math.pi * into_cosine / cfg.cosine_tokens))
    if into_cosine <= cfg.cosine_tokens + cfg.low_tokens:
        return cfg.low
    return cfg.final


def num_micro_batches(tokens: int, cfg: BatchConfig) -> int:
    """Micro-batches of the step that starts at `tokens`: linear from `start` to `full` sequences, to the nearest."""
    if tokens >= cfg.ramp_tokens:
        return cfg.full // cfg.micro
    sequences_times_ramp = cfg.start * cfg.ramp_tokens + (cfg.full - cfg.start) * tokens
    unit = cfg.micro * cfg.ramp_tokens
    return (2 * sequences_times_ramp + unit) // (2 * unit)


def mtp_weight(tokens: int, cfg: AuxiliaryConfig) -> float:
    """λ of the step that ends at `tokens`."""
    return cfg.mtp_weight if tokens <= cfg.mtp_switch_tokens else cfg.mtp_weight_late


def bias_speed(tokens: int, cfg: AuxiliaryConfig) -> float:
    """γ of the step that ends at `tokens`."""
    return cfg.bias_speed if tokens <= cfg.bias_stop_tokens else 0.0
