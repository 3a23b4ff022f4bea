"""One batch: what a model reads, and what it should predict at each position."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.typing import Float, Int


class Batch(NamedTuple):
    """Rows of one length. Index 0 of `labels` and `weights` is the main model, index k the MTP module of depth k.

    `labels[k, b, t]` is token t+1+k of the row; its weight is 0 where that lies outside the row, or in padding, or in
    another document when documents are masked. Stacked micro-batches have one more axis, in front of all others.
    """

    tokens: Int[Any, "B T"]
    labels: Int[Any, "d B T"]
    weights: Float[Any, "d B T"]
    positions: Int[Any, "B T"] | None = None
    segment_ids: Int[Any, "B T"] | None = None
    """None when attention crosses documents; 0 is padding."""
    num_bytes: Int[Any, "B"] | None = None
    """Bytes of text that the labels of a held-out row stand for; None in training."""


def make_batch(
    tokens: Int[np.ndarray, "B T_plus_1"],
    segment_ids: Int[np.ndarray, "B T_plus_1"] | None = None,
    positions: Int[np.ndarray, "B T_plus_1"] | None = None,
    *,
    mtp_depth: int = 0,
    document_mask: bool = True,
) -> Batch:
    """Inputs, and the labels of every depth, from rows of one token more.

    Labels stay within their segment. `document_mask=False` (the report's pre-training): no masks reach the model,
    attention crosses documents. Without `segment_ids` a row is one document. `positions` are 0..T-1 by default.
    """
    B, T = tokens.shape[0], tokens.shape[1] - 1
    labels = np.zeros((mtp_depth + 1, B, T), np.int32)
    weights = np.zeros((mtp_depth + 1, B, T), np.float32)
    for k in range(min(mtp_depth, T - 1) + 1):
        labels[k, :, : T - k] = tokens[:, 1 + k :]
        weights[k, :, : T - k] = 1 if segment_ids is None else _is_followed(segment_ids, 1 + k)
    inputs = tokens[:, :-1].astype(np.int32)
    if segment_ids is None or not document_mask:
        return Batch(inputs, labels, weights)
    if positions is None:
        positions = np.broadcast_to(np.arange(T + 1), (B, T + 1))
    return Batch(inputs, labels, weights, positions[:, :-1].astype(np.int32), segment_ids[:, :-1].astype(np.int32))


def stack(batches: Sequence[Batch]) -> Batch:
    """Micro-batches as one `Batch` whose arrays have a leading axis of them."""
    return Batch(*(None if arrays[0] is None else np.stack(arrays) for arrays in zip(*batches, strict=True)))


def take_rows(batch: Batch, rows: slice) -> Batch:
    """Those rows of a batch."""
    labels, weights = batch.labels[:, rows], batch.weights[:, rows]
    rest = (None if leaf is None else leaf[rows] for leaf in (batch.positions, batch.segment_ids, batch.num_bytes))
    return Batch(batch.tokens[rows], labels, weights, *rest)


def _is_followed(segment_ids: Int[np.ndarray, "B T_plus_1"], distance: int) -> np.ndarray:
    """Whether the token `distance` later is of the same document, bool[B, T + 1 - distance]."""
    here, there = segment_ids[:, :-distance], segment_ids[:, distance:]
    return (here == there) & (here != 0)
