"""Which row of the device's table of edits belongs to which sequence."""

from collections.abc import Sequence as Several

import jax
import numpy as np

from dsv3_jax.serving.edits import Edits, count, empty_edits, set_row
from dsv3_jax.serving.request_rows import edit_row, has_edits
from dsv3_jax.serving.sequence import Sequence
from dsv3_jax.typing import Array, Int


class EditSlots:
    """A table of edits for the sequences that need any, written when they come and counted on by their tokens."""

    def __init__(self, num_slots: int, vocab_size: int):
        self.table: Edits = empty_edits(num_slots, vocab_size)
        self._vocab_size, self._neutral = vocab_size, num_slots
        self._free = list(range(num_slots))
        self._slots: dict[int, int] = {}
        """By the sequence's id, the one used longest ago first."""
        self._lengths: dict[int, int] = {}
        """Tokens of the sequence that its row knows."""

    def slots_of(self, sequences: Several[Sequence | None]) -> Int[np.ndarray, "B"]:
        """The row of each, up to date with its tokens; for those without edits the one that changes nothing."""
        editing = [sequence for sequence in sequences if sequence is not None and has_edits(sequence)]
        for sequence in editing:
            self._slots[sequence.id] = self._slots.pop(sequence.id, -1)  # now the last of them
        for sequence in editing:
            if self._slots[sequence.id] < 0:
                self._slots[sequence.id] = self._take()
                self._lengths.pop(sequence.id, None)
            if self._lengths.get(sequence.id) != len(sequence.tokens):
                self._write(sequence)
        found = [self._neutral if one is None else self._slots.get(one.id, self._neutral) for one in sequences]
        return np.array(found, np.int32)

    def count(self, sequences: Several[Sequence | None], slots: Int[np.ndarray, "B"], ids: Int[Array, "B"]) -> None:
        """Adds the drawn `ids` to the rows of their sequences, on the device."""
        if (slots != self._neutral).any():
            self.table = count(self.table, slots, ids)
        for sequence in sequences:
            if sequence is not None and sequence.id in self._slots:
                self._lengths[sequence.id] = len(sequence.tokens) + 1

    def exercise(self, ids: Int[Array, "B"]) -> None:
        """Runs what changes the table, with nothing to change."""
        self.table = set_row(self.table, np.int32(self._neutral), last_row(self.table))
        self.table = count(self.table, np.full(ids.shape, self._neutral, np.int32), ids)

    def forget(self, sequence: Sequence) -> None:
        """Frees the row of a sequence that has ended."""
        slot = self._slots.pop(sequence.id, None)
        self._lengths.pop(sequence.id, None)
        if slot is not None:
            self._free.append(slot)

    def _take(self) -> int:
        """A free slot, or that of the sequence which has not been here for longest: one that was preempted."""
        if self._free:
            return self._free.pop()
        oldest = next(one for one, slot in self._slots.items() if slot >= 0)
        self._lengths.pop(oldest, None)
        return self._slots.pop(oldest)

    def _write(self, sequence: Sequence) -> None:
        slot = np.int32(self._slots[sequence.id])
        self.table = set_row(self.table, slot, edit_row(sequence, self._vocab_size))
        self._lengths[sequence.id] = len(sequence.tokens)


def last_row(table: Edits) -> Edits:
    """The one that changes nothing, as the host gives one."""
    return jax.tree.map(lambda column: np.asarray(column[-1]), table)
