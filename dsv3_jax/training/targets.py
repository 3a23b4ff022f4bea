"""What each position should predict, made on the host so that a step knows its denominators before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.typing import Float, Int


class MicroBatch(NamedTuple):
    """One micro-batch. Index 0 of `labels` and `weights` is the main model, index k the MTP module of depth k.

    `labels[k, b, t]` is token t+1+k of the row; its weight is 0 where that lies outside the row, or in padding,
    or in another document when documents are masked. `segment_ids` is None when attention crosses documents.
    """

    tokens: Int[Any, "B T"]
    labels: Int[Any, "d B T"]
    weights: Float[Any, "d B T"]
    positions: Int[Any, "B T"] | None
    segment_ids: Int[Any, "B T"] | None


def make_micro_batch(batch: Mapping[str, Int[np.ndarray, "B T"]], *, mtp_depth: int, document_mask: bool) -> MicroBatch:
    """Labels of every depth from a batch of `dsv3_jax.data` (its keys: see `data.pack.as_batch`).

    `targets[:, t]` is the token after `tokens[:, t]`; `loss_mask` is 0 where it lies in another document or in
    padding (segment 0). Without `document_mask` (the report's pre-training) a row is one document and no masks
    reach the model.
    """
    tokens, targets, segments = batch["tokens"], batch["targets"], batch["segment_ids"]
    B, T = tokens.shape
    labels = np.zeros((mtp_depth + 1, B, T), np.int32)
    weights = np.zeros((mtp_depth + 1, B, T), np.float32)
    for k in range(min(mtp_depth, T - 1) + 1):
        labels[k, :, : T - k] = targets[:, k:]
        weights[k, :, : T - k] = (batch["loss_mask"][:, k:] != 0) & (segments[:, k:] == segments[:, : T - k])
    masks = (batch["positions"], segments) if document_mask else (None, None)
    return MicroBatch(tokens, labels, weights, *masks)


def label_counts(micro_batches: Sequence[MicroBatch]) -> Float[np.ndarray, "d"]:
    """Labels of each depth in the whole batch, at least 1: what the sums of losses are divided by."""
    total = sum(np.count_nonzero(batch.weights, axis=(1, 2)).astype(np.int64) for batch in micro_batches)
    return np.maximum(np.asarray(total), 1).astype(np.float32)
