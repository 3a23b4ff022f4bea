"""A grain dataset of full rows, made of pieces of documents."""

from typing import Any

import grain
import numpy as np


class FullRows(grain.IterDataset):
    """Rows of `seq_len` + 1 tokens without padding: a piece of that size is a row, shorter ones are joined and cut.

    The last token of a cut row is the first of the next, so no label is lost. `tokens_segment_ids` number the pieces of
    a row from 1. The pieces should be endless.
    """

    def __init__(self, pieces: grain.MapDataset, *, seq_len: int):
        super().__init__(pieces)
        self._seq_len = seq_len

    def __iter__(self) -> "FullRowsIterator":
        return FullRowsIterator(self._parents[0], seq_len=self._seq_len)


class FullRowsIterator(grain.DatasetIterator):
    """The cursor of `FullRows`: the next piece, and which pieces wait, the first of them from `offset` on."""

    def __init__(self, pieces: Any, *, seq_len: int):
        super().__init__()
        self._pieces, self._size = pieces, seq_len + 1
        self._next, self._offset = 0, 0
        self._waiting: dict[int, np.ndarray] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        while sum(map(len, self._waiting.values())) - self._offset < self._size:
            tokens: np.ndarray = self._pieces[self._next]["tokens"]
            if len(tokens) > 1:  # fewer have no label
                self._waiting[self._next] = tokens
            self._next += 1
            if len(tokens) == self._size:
                return self._row([self._waiting.popitem()[1]])
        return self._cut()

    def get_state(self) -> dict[str, Any]:
        return {"next_piece": self._next, "waiting": list(self._waiting), "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._offset = state["next_piece"], state["offset"]
        self._waiting = {index: self._pieces[index]["tokens"] for index in state["waiting"]}

    def _cut(self) -> dict[str, np.ndarray]:
        """A row of what waits, which is enough for one."""
        parts: list[np.ndarray] = []
        missing = self._size
        while missing:
            index, tokens = next(iter(self._waiting.items()))
            parts.append(tokens[self._offset : self._offset + missing])
            missing -= len(parts[-1])
            self._offset += len(parts[-1])
            if self._offset == len(tokens):
                del self._waiting[index]
                self._offset = 0
            else:
                self._offset -= 1  # its label is in the next row
        return self._row(parts)

    def _row(self, parts: list[np.ndarray]) -> dict[str, np.ndarray]:
        segment_ids = np.repeat(np.arange(1, len(parts) + 1), list(map(len, parts)))
        return {"tokens": np.concatenate(parts).astype(np.int32), "tokens_segment_ids": segment_ids.astype(np.int32)}
