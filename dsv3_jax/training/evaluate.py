"""Held-out loss, per token and per byte of text."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch, take_rows
from dsv3_jax.model.functions import Functions, functions_for
from dsv3_jax.model.transformer import hidden_states
from dsv3_jax.parallel.axes import PIPE, ROWS
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.training.batches import own_rows
from dsv3_jax.training.loss import next_token_loss
from dsv3_jax.training.sharded import sharded_evaluator, used_axes
from dsv3_jax.typing import Array, Float, Variables


class Evaluation(NamedTuple):
    """`loss` is nats a token; `bits_per_byte` compares models with different tokenizers, and with compressors."""

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


_ROWS = (PIPE, *ROWS)
"""Ranks of a pipeline share the rows of an evaluation, too."""

SumLoss = Callable[[Variables, Batch], Float[Array, ""]]


def make_evaluator(cfg: RunConfig, *, functions: Functions | None = None) -> SumLoss:
    """Compiles Σ -log p(label) · weight over the positions of a batch; no MTP."""

    @jax.jit
    def sum_loss(variables: Variables, batch: Batch) -> Float[Array, ""]:
        states = hidden_states(
            cfg.model,
            variables,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            functions=functions or functions_for(cfg.precision),
            with_mtp=False,
        )
        head = variables["params"]["unembed"]["w"]
        return next_token_loss(
            states.hidden, head, batch.labels[0], batch.weights[0], chunk_size=cfg.train.loss_chunk_size
        )

    return sum_loss


def evaluator_on(cfg: RunConfig, mesh: Mesh | None, functions: Functions) -> SumLoss:
    """`make_evaluator`, or its twin on a mesh: of whole batches of `num_rows_on`, each process scores its rows."""
    if mesh is None:
        return make_evaluator(cfg, functions=functions)
    of_own_rows, rows = sharded_evaluator(cfg, mesh, functions), used_axes(mesh, _ROWS)

    def sum_loss(variables: Variables, batch: Batch) -> Float[Array, ""]:
        return of_own_rows(variables, take_rows(batch, own_rows(len(batch.tokens), mesh, rows)))

    return sum_loss


def num_rows_on(mesh: Mesh | None, at_least: int) -> int:
    """Rows of a held-out batch that the devices of a mesh share equally."""
    each = 1 if mesh is None else size_of(mesh, _ROWS)
    return -(-at_least // each) * each


def evaluate(sum_loss: SumLoss, variables: Variables, batches: Iterable[Batch]) -> Evaluation | None:
    """Loss over all of `batches` (`data.loader.heldout_batches`); `num_bytes` is what their scored tokens stand for.

    None when they score no token, or no byte: no number would be true then.
    """
    total, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        assert batch.num_bytes is not None
        total += float(sum_loss(variables, batch._replace(num_bytes=None)))
        num_tokens += int(np.count_nonzero(batch.weights))
        num_bytes += int(batch.num_bytes.sum())
    if not num_tokens or not num_bytes:
        return None
    return Evaluation(total / num_tokens, total / math.log(2.0) / num_bytes, num_tokens, num_bytes)


def warm_up(sum_loss: SumLoss, variables: Variables, batches: Iterator[Batch]) -> None:
    """Compiles `sum_loss` by scoring the first of `batches`."""
    for batch in itertools.islice(batches, 1):
        sum_loss(variables, batch._replace(num_bytes=None)).block_until_ready()
