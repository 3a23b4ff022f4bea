"""Packing: documents of any length into rows of one length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def as_document(tokens: Int[np.ndarray, "N"], *, bos_id: int | None, eos_id: int | None) -> Int[np.ndarray, "_"]:
    """Frames a text by bos and eos: its first token has something to follow, and its end is predicted too.

    A mark that is None is left out; without bos the first token of a text is no label of it.
    """
    begin, end = ([] if mark is None else [mark] for mark in (bos_id, eos_id))
    return np.concatenate([begin, tokens, end]).astype(np.int32)


def join_and_cut(documents: Sequence[Int[np.ndarray, "_"]], seq_len: int) -> Int[np.ndarray, "B T_plus_1"]:
    """Joins documents into one stream and cuts it into rows of `seq_len` + 1 tokens (the report's pre-training).

    The last token of a row is the first of the next, so every token but the first of all is a label exactly once.
    A tail shorter than a row is left out. The plain twin of `rows.JoinedRows`, which streams.
    """
    stream = np.concatenate(documents).astype(np.int32)
    num_rows = max(0, (len(stream) - 1) // seq_len)
    return stream[np.arange(num_rows)[:, None] * seq_len + np.arange(seq_len + 1)[None, :]]


def cut_document(tokens: Int[np.ndarray, "N"], seq_len: int) -> list[Int[np.ndarray, "_"]]:
    """Cuts one document into pieces of at most `seq_len` + 1 tokens that overlap by one, so no label is lost."""
    return [tokens[start : start + seq_len + 1] for start in range(0, max(1, len(tokens) - 1), seq_len)]


def heldout_windows(num_tokens: int, seq_len: int, overlap: float) -> list[tuple[int, int, int]]:
    """Covers a document of `num_tokens` by windows (start, first, stop): feeds start..stop-2, scores first..stop-1.

    Each token but the first is scored in exactly one window. Windows after the first are full and keep at least
    `overlap` · `seq_len` tokens as context that is not scored again.
    """
    step = max(1, seq_len - int(seq_len * overlap))
    scored = 1
    windows = []
    while scored < num_tokens:
        stop = min(num_tokens, scored + (seq_len if scored == 1 else step))
        windows.append((max(0, stop - seq_len - 1), scored, stop))
        scored = stop
    return windows
