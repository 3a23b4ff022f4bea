"""Packing: documents of any length into rows of one length."""

import numpy as np
from jaxtyping import Int


def as_document(tokens: Int[np.ndarray, "N"], *, bos_id: int | None, eos_id: int | None) -> Int[np.ndarray, "_"]:
    """Frames a text by bos and eos: its first token has something to follow, and its end is predicted too.

    A mark that is None is left out; without bos the first token of a text is no label of it.
    """
    begin, end = ([] if mark is None else [mark] for mark in (bos_id, eos_id))
    return np.concatenate([begin, tokens, end]).astype(np.int32)


def piece(document: Int[np.ndarray, "N"], number: int, *, num_pieces: int, seq_len: int) -> Int[np.ndarray, "_"]:
    """Piece `number` of a document in rows of `seq_len` + 1 tokens that overlap by one; the last is all that is left.

    So each label is in one piece, wherever the document was longer or shorter than its `num_pieces` suppose.
    """
    start = number * seq_len
    return document[start:] if number == num_pieces - 1 else document[start : start + seq_len + 1]


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
