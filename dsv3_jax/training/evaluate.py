"""Held-out loss, per token and per byte of text."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config.run import RunConfig
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.precision.policy import get_policy
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.typing import Array, Float, Variables


class Evaluation(NamedTuple):
    """`loss` is nats a token; `bits_per_byte` compares models with different tokenizers, and with compressors."""

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


SumLoss = Callable[[Variables, Mapping[str, np.ndarray]], Float[Array, ""]]


def make_evaluator(cfg: RunConfig) -> SumLoss:
    """Compiles Σ -log p(target) over the positions of a batch whose `loss_mask` is set; no MTP."""

    @jax.jit
    def sum_loss(variables: Variables, batch: Mapping[str, Array]) -> Float[Array, ""]:
        states = hidden_states(
            cfg.model,
            variables,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            policy=get_policy(cfg.precision),
            with_mtp=False,
        )
        weights = batch["loss_mask"].astype(np.float32)
        head = variables["params"]["unembed"]["w"]
        return next_token_loss(states.hidden, head, batch["targets"], weights, chunk_size=cfg.train.loss_chunk_size)

    return sum_loss


def evaluate(sum_loss: SumLoss, variables: Variables, batches: Iterable[Mapping[str, np.ndarray]]) -> Evaluation:
    """Loss over all of `batches` (`data.loader.heldout_batches`); `num_bytes` is what their scored tokens stand for."""
    total, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "num_bytes"}
        total += float(sum_loss(variables, inputs))
        num_tokens += int(np.count_nonzero(batch["loss_mask"]))
        num_bytes += int(batch["num_bytes"].sum())
    return Evaluation(total / max(num_tokens, 1), total / math.log(2.0) / max(num_bytes, 1), num_tokens, num_bytes)
