"""A grain transformation that joins a stream of documents and cuts it into rows."""

from typing import Any

import grain
import numpy as np


class JoinedRows(grain.IterDataset):
    """Rows of `seq_len` + 1 tokens from a stream of documents (`pack.join_and_cut`, streamed).

    A document is an int array of at least one token; the stream should be endless, a last partial row is left out.
    """

    def __init__(self, parent: grain.IterDataset, *, seq_len: int):
        super().__init__(parent)
        self._seq_len = seq_len

    def __iter__(self) -> "JoinedRowsIterator":
        return JoinedRowsIterator(self._parent.__iter__(), seq_len=self._seq_len)


class JoinedRowsIterator(grain.DatasetIterator):
    """The cursor of `JoinedRows`: the parent's state before the current document, and an offset into it."""

    def __init__(self, parent: grain.DatasetIterator, *, seq_len: int):
        super().__init__(parent)
        self._seq_len = seq_len
        self._before: dict[str, Any] = self._parent.get_state()
        self._document: np.ndarray | None = None
        self._offset = 0

    def __next__(self) -> dict[str, np.ndarray]:
        parts: list[np.ndarray] = []
        missing = self._seq_len + 1
        while missing:
            document = self._current()
            part = document[self._offset : self._offset + missing]
            parts.append(part)
            missing -= len(part)
            self._offset += len(part)
            if missing:
                self._document, self._offset = None, 0
        self._offset -= 1  # the last label is the next row's first input
        return {"tokens": np.concatenate(parts).astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before = state["parent"]
        self._parent.set_state(state["parent"])
        self._document, self._offset = None, state["offset"]

    def _current(self) -> np.ndarray:
        if self._document is None:
            self._before = self._parent.get_state()
            document: np.ndarray = next(self._parent)
            self._document = document
        return self._document
