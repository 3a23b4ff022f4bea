"""Batches: an endless, resumable stream for training and a finite one for evaluation."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int, Integer

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import fim, pack
from dsv3_jax.data.batch import Batch, make_batch
from dsv3_jax.data.rows import JoinedRows
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.token_split import split_at_line_breaks
from dsv3_jax.data.tokenizer import TextTokenizer

_NUM_BINS = 16


def make_train_iterator(
    cfg: DataConfig,
    tokenizer: TextTokenizer,
    shards: Shards,
    *,
    batch_size: int,
    seq_len: int,
    mtp_depth: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of `batch_size` rows with labels of every depth, reshuffled every epoch.

    `get_state()` is small JSON; `set_state` of it, in a fresh iterator made with the same arguments, continues with
    the next batch, bit for bit. What happens to a document depends on (seed, document, epoch) only. Process i of
    n reads every n-th document of each epoch's order; `batch_size` is this process's. Call `close()` at the end.

    Raises:
        UserError: fewer documents than processes, or marks for fill-in-the-middle are missing.
    """
    if len(shards) < process_count:
        raise UserError(
            f"{len(shards)} training documents cannot feed {process_count} processes; use more, smaller documents."
        )
    if cfg.fim_rate > 0 and tokenizer.fim is None:
        raise UserError("the tokenizer lacks the marks of fill-in-the-middle; set data.fim_rate=0.")
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(4)]
    arrange = functools.partial(
        _arrange, tokenizer=tokenizer, fim_rate=cfg.fim_rate, token_split_rate=cfg.token_split_rate
    )
    documents = grain.MapDataset.source(shards).random_map(arrange, seed=seeds[0]).shuffle(seed=seeds[1])
    documents = documents.slice(slice(process_index, None, process_count)).repeat(None)
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if cfg.document_mask:
        rows = _separate_rows(stream, seq_len=seq_len, pad_id=tokenizer.pad_id, seed=seeds[3])
    else:
        rows = JoinedRows(stream, seq_len=seq_len)
    if cfg.shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=cfg.shuffle_rows, seed=seeds[2])
    batches = rows.batch(batch_size, drop_remainder=True).map(functools.partial(_finish, mtp_depth=mtp_depth))
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
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every held-out token once, as it is: batches of depth 0 with `num_bytes`, always in the same order.

    Documents are `bos text eos`, each in windows of its own (`pack.heldout_windows`), which come in an order drawn
    once, so that the first `max_batches` are a fair sample. `weights` mark the labels a window scores, `num_bytes` the
    UTF-8 bytes these stand for. So bits per byte = Σ nll (nats) · weights / ln 2 / Σ num_bytes, with every byte and
    every end of document paid for. The last batch is filled up with rows of padding; all processes get the same
    number of batches.
    """
    windows = _windows(tokenizer, shards, seq_len, overlap)
    size = batch_size * process_count
    num_batches = 0
    while max_batches is None or num_batches < max_batches:
        rows = list(itertools.islice(windows, size))
        if not rows:
            return
        blank = _Window(np.full_like(rows[0].tokens, tokenizer.pad_id), *map(np.zeros_like, rows[0][1:]))
        mine = (rows + [blank] * (size - len(rows)))[process_index * batch_size : (process_index + 1) * batch_size]
        tokens, segment_ids, is_scored, num_bytes = map(np.stack, zip(*mine, strict=True))
        yield make_batch(tokens, segment_ids)._replace(weights=is_scored[None], num_bytes=num_bytes)
        num_batches += 1


def num_heldout_batches(
    tokenizer: TextTokenizer, shards: Shards, *, batch_size: int, seq_len: int, overlap: float = 0.5
) -> int:
    """How many batches `heldout_batches` yields without a bound, to one process."""
    return -(-len(_places(tokenizer, shards, seq_len, overlap)) // batch_size)


def _arrange(
    tokens: Integer[np.ndarray, "_"],
    rng: np.random.Generator,
    *,
    tokenizer: TextTokenizer,
    fim_rate: float,
    token_split_rate: float,
) -> np.ndarray:
    ids = tokens.astype(np.int32)
    if rng.random() < fim_rate and tokenizer.fim is not None:
        parts = fim.split(tokenizer.decode(ids), rng)
        ids = fim.assemble(*(tokenizer.encode(part) for part in parts), ids=tokenizer.fim)
    if token_split_rate > 0:
        ids = split_at_line_breaks(ids, tokenizer.line_break_halves, rate=token_split_rate, rng=rng)
    return pack.as_document(ids, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


class _Cut(grain.experimental.FlatMapTransform):
    """Documents longer than a row become several pieces."""

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.max_fan_out = 2**31

    def flat_map(self, element: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{"tokens": piece} for piece in pack.cut_document(element, self.seq_len)]


def _separate_rows(stream: grain.IterDataset, *, seq_len: int, pad_id: int, seed: int) -> grain.IterDataset:
    pieces = grain.experimental.FlatMapIterDataset(stream, _Cut(seq_len))
    return grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": seq_len + 1},
        padding_struct={"tokens": pad_id},
        num_packing_bins=_NUM_BINS,
        seed=seed,
    )


def _finish(rows: dict[str, np.ndarray], *, mtp_depth: int) -> Batch:
    masks = (rows.get("tokens_segment_ids"), rows.get("tokens_positions"))
    return make_batch(rows["tokens"], *masks, mtp_depth=mtp_depth)


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
