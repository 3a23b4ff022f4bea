"""Batches: an endless, resumable stream for training and a finite one for evaluation."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.config.check import UserError, check, divisors, one_of
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.mesh_rules import check_streams
from dsv3_jax.data import pack
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.data.pieces import Documents, shuffled_pieces
from dsv3_jax.data.row_streams import Part, RowStreams
from dsv3_jax.data.rows import FullRows
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.tokenizer import TextTokenizer

_NUM_BINS = 16
_MOST_WAITING_TOKENS = 2**17
"""Bounds of the rows that wait in each stream with masks: fewer pack less densely, more take memory."""


def make_train_iterator(
    cfg: DataConfig,
    tokenizer: TextTokenizer,
    shards: Shards,
    *,
    batch_size: int,
    seq_len: int,
    mtp_depth: int,
    seed: int,
    part: Part | None = None,
) -> grain.DatasetIterator:
    """Endless batches of `batch_size` rows with labels of every depth; each epoch has its own order of all pieces.

    `get_state()` is small JSON; `set_state` of it, in a fresh iterator made with the same arguments, continues with
    the very next batch, bit for bit. With `part`, only that part of the rows of every batch is made, from its part of
    `cfg.streams`; neither batches nor states depend on the number of parts (`row_streams`). Call `close()` at the end.

    Raises:
        UserError: marks for fill-in-the-middle are missing, or batch or streams do not divide into such parts.
    """
    part = part or Part()
    _check_part(part, batch_size, cfg.streams)
    if cfg.fim_rate > 0 and tokenizer.fim is None:
        raise UserError("the tokenizer lacks the marks of fill-in-the-middle; set data.fim_rate=0.")
    arranging, shuffling, packing = (int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(3))
    documents = Documents(
        shards, tokenizer, fim_rate=cfg.fim_rate, token_split_rate=cfg.token_split_rate, seed=arranging
    )
    pieces = shuffled_pieces(documents, seq_len=seq_len, seed=shuffling)
    rows_of = functools.partial(FullRows, seq_len=seq_len)
    if cfg.document_mask:
        rows_of = functools.partial(_separate_rows, seq_len=seq_len, pad_id=tokenizer.pad_id, seed=packing)
    rows = RowStreams(pieces, rows_of, num_streams=cfg.streams, batch_size=batch_size, part=part)
    batches = rows.map(functools.partial(_finish, mtp_depth=mtp_depth, document_mask=cfg.document_mask))
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=cfg.prefetch_batches)
    return iter(batches)


def heldout_batches(
    tokenizer: TextTokenizer,
    shards: Shards,
    *,
    batch_size: int,
    seq_len: int,
    overlap: float = 0.5,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Every held-out token once, as it is: batches of depth 0 with `num_bytes`, always in the same order.

    Documents are `bos text eos`, each in windows of its own (`pack.heldout_windows`), which come in an order drawn
    once, so that the first `max_batches` are a fair sample. `weights` mark the labels a window scores, `num_bytes` the
    UTF-8 bytes these stand for. So bits per byte = Σ nll (nats) · weights / ln 2 / Σ num_bytes, with every byte and
    every end of document paid for. The last batch is filled up with rows of padding. Every process makes whole
    batches: they cost little, and what they score is known to all.
    """
    windows = _windows(tokenizer, shards, seq_len, overlap)
    num_batches = 0
    while max_batches is None or num_batches < max_batches:
        rows = list(itertools.islice(windows, batch_size))
        if not rows:
            return
        blank = _Window(np.full_like(rows[0].tokens, tokenizer.pad_id), *map(np.zeros_like, rows[0][1:]))
        rows += [blank] * (batch_size - len(rows))
        tokens, segment_ids, is_scored, num_bytes = map(np.stack, zip(*rows, strict=True))
        yield make_batch(tokens, segment_ids)._replace(weights=is_scored[None], num_bytes=num_bytes)
        num_batches += 1


def num_heldout_batches(
    tokenizer: TextTokenizer, shards: Shards, *, batch_size: int, seq_len: int, overlap: float = 0.5
) -> int:
    """How many batches `heldout_batches` yields without a bound."""
    return -(-len(_places(tokenizer, shards, seq_len, overlap)) // batch_size)


class _Cut(grain.experimental.FlatMapTransform):
    """The last piece of a document may be longer than a row, or have no label."""

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.max_fan_out = 2**31

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        tokens = element["tokens"]
        starts = range(0, len(tokens) - 1, self.seq_len)
        return [{"tokens": tokens[start : start + self.seq_len + 1]} for start in starts]


def _separate_rows(pieces: grain.MapDataset, *, seq_len: int, pad_id: int, seed: int) -> grain.IterDataset:
    stream = pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return grain.experimental.FirstFitPackIterDataset(
        grain.experimental.FlatMapIterDataset(stream, _Cut(seq_len)),
        length_struct={"tokens": seq_len + 1},
        padding_struct={"tokens": pad_id},
        num_packing_bins=max(2, min(_NUM_BINS, _MOST_WAITING_TOKENS // seq_len)),
        seed=seed,
    )


def _check_part(part: Part, batch_size: int, num_streams: int) -> None:
    check_streams(num_streams, part.count)
    check(
        batch_size % part.count == 0,
        f"train.batch.micro={batch_size} cannot be shared by {part.count} processes that make rows of their own; they "
        f"may be {one_of(divisors(batch_size), near=part.count)}.",
    )


def _finish(rows: dict[str, np.ndarray], *, mtp_depth: int, document_mask: bool) -> Batch:
    tokens, segment_ids = rows["tokens"], rows["tokens_segment_ids"]
    positions = rows["tokens_positions"] if document_mask else None
    return make_batch(tokens, segment_ids, positions, mtp_depth=mtp_depth, document_mask=document_mask)


def _places(tokenizer: TextTokenizer, shards: Shards, seq_len: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """(document, *window) of every window."""
    num_marks = sum(mark is not None for mark in (tokenizer.bos_id, tokenizer.eos_id))
    return [
        (record, *window)
        for record in range(len(shards))
        for window in pack.heldout_windows(len(shards[record]) + num_marks, seq_len, overlap)
    ]


class _Window(NamedTuple):
    """One row of held-out text: 1 where tokens are real, 1 where their labels are scored, the bytes of these."""

    tokens: Int[np.ndarray, "T_plus_1"]
    segment_ids: Int[np.ndarray, "T_plus_1"]
    is_scored: Float[np.ndarray, "T"]
    num_bytes: np.ndarray


def _windows(tokenizer: TextTokenizer, shards: Shards, seq_len: int, overlap: float) -> Iterator[_Window]:
    places = _places(tokenizer, shards, seq_len, overlap)
    sizes = tokenizer.bytes_per_token
    for place in np.random.default_rng(0).permutation(len(places)):
        record, start, first, stop = places[place]
        ids = shards[record].astype(np.int32)
        document = pack.as_document(ids, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        padded = np.full(seq_len + 1, tokenizer.pad_id, np.int32)
        padded[: stop - start] = document[start:stop]
        segments = (np.arange(seq_len + 1) < stop - start).astype(np.int32)
        label = np.arange(start + 1, start + seq_len + 1)
        is_scored = ((label >= first) & (label < stop)).astype(np.float32)
        yield _Window(padded, segments, is_scored, np.asarray(sizes[document[first:stop]].sum(), np.int32))
