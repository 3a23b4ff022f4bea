"""Batches whose rows come from many independent streams, so that each process makes its own rows alone.

Of S streams, stream s reads pieces s, s + S, s + 2S, … of the shuffled order. A batch of B rows and the streams are
both cut into G = gcd(B, S) equal groups; the rows of a group come from the streams of that group in turn, batch after
batch. For every number of parts that divides G, the i-th part of a batch therefore comes from the i-th part of the
streams: which rows a batch has does not depend on how many processes make it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int


class Part(NamedTuple):
    """One of `count` equal parts of every batch, the `index`-th."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """Its items among `size`, a multiple of `count`."""
        each = size // self.count
        return slice(self.index * each, (self.index + 1) * each)


def streams_of_batch(number: int, *, batch_size: int, num_streams: int) -> Int[np.ndarray, "B"]:
    """The stream of each row of batch `number`."""
    num_groups = math.gcd(batch_size, num_streams)
    rows, streams = batch_size // num_groups, num_streams // num_groups
    turn = (number * rows + np.arange(rows)) % streams
    return (streams * np.arange(num_groups)[:, None] + turn).reshape(-1)


class RowStreams(grain.IterDataset):
    """One part of every batch, as {name: [rows, …]}, from `num_streams` streams of rows.

    Args:
        pieces: endless, by random access.
        rows_of: the rows made of such pieces, an endless dataset with a state of its own.
        num_streams: of all parts together.
        batch_size: rows of a whole batch.
        part: which rows these are; its count divides `batch_size` and `num_streams`.
    """

    def __init__(
        self,
        pieces: grain.MapDataset,
        rows_of: Callable[[grain.MapDataset], grain.IterDataset],
        *,
        num_streams: int,
        batch_size: int,
        part: Part,
    ):
        super().__init__(pieces)
        self._pieces, self._rows_of = pieces, rows_of
        self._num_streams, self._batch_size, self._part = num_streams, batch_size, part

    def __iter__(self) -> "RowStreamsIterator":
        own = range(self._num_streams)[self._part.of(self._num_streams)]
        streams = {stream: iter(self._rows_of(self._pieces[stream :: self._num_streams])) for stream in own}
        return RowStreamsIterator(
            streams, num_streams=self._num_streams, batch_size=self._batch_size, rows=self._part.of(self._batch_size)
        )


class RowStreamsIterator(grain.DatasetIterator):
    """The cursor of `RowStreams`: the next batch, and where each stream is.

    The states of all parts, their "streams" joined, are that of one process that makes whole batches.
    """

    def __init__(self, streams: dict[int, Any], *, num_streams: int, batch_size: int, rows: slice):
        super().__init__()
        self._streams, self._rows, self._next = streams, rows, 0
        self._sizes = {"num_streams": num_streams, "batch_size": batch_size}
        self._states = {str(number): stream.get_state() for number, stream in streams.items()}

    def __next__(self) -> dict[str, np.ndarray]:
        rows = []
        for number in streams_of_batch(self._next, **self._sizes)[self._rows].tolist():
            rows.append(next(self._streams[number]))
            self._states[str(number)] = self._streams[number].get_state()
        self._next += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        return _Snapshot(next_batch=self._next, streams=dict(self._states))

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = state["next_batch"]
        for number, stream in self._streams.items():
            stream.set_state(state["streams"][str(number)])
            self._states[str(number)] = stream.get_state()


class _Snapshot(dict):
    """Nobody alters it, so a copy is itself: prefetching copies a state a batch, and it has dozens of streams'."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Snapshot":
        return self
