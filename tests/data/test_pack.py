import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import pack


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 6))
def test_pieces_of_a_document_hold_each_label_once(size, seq_len, num_pieces):
    """Also where the document is longer or shorter than the number of pieces supposes."""
    document = np.arange(size)
    pieces = [pack.piece(document, n, num_pieces=num_pieces, seq_len=seq_len) for n in range(num_pieces)]
    assert all(len(piece) <= seq_len + 1 for piece in pieces[:-1])
    np.testing.assert_array_equal(np.concatenate([piece[1:] for piece in pieces]), document[1:])
    np.testing.assert_array_equal(np.concatenate([piece[:-1] for piece in pieces]), document[:-1])


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 60), st.floats(0, 0.99))
def test_heldout_windows_score_each_token_once_with_context(size, seq_len, overlap):
    windows = pack.heldout_windows(size, seq_len, overlap)
    assert [t for _, first, stop in windows for t in range(first, stop)] == list(range(1, size))
    for number, (start, first, stop) in enumerate(windows):
        assert 0 <= start < first < stop <= start + seq_len + 1
        if number:
            assert stop - start == seq_len + 1
            assert first - start - 1 >= int(seq_len * overlap) or seq_len == 1


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_short_document_is_one_window(overlap):
    assert pack.heldout_windows(9, 8, overlap) == [(0, 1, 9)]
