import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import pack

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(
    lambda sizes: [np.arange(100 * i, 100 * i + size, dtype=np.int32) for i, size in enumerate(sizes)]
)


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(1, 20))
def test_join_and_cut_keeps_every_token_in_order_and_each_is_a_label_once(documents, seq_len):
    rows = pack.join_and_cut(documents, seq_len)
    stream = np.concatenate(documents)
    assert rows.shape == ((len(stream) - 1) // seq_len, seq_len + 1)
    labels = rows[:, 1:].reshape(-1)
    np.testing.assert_array_equal(labels, stream[1 : 1 + len(labels)])
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), stream[: len(labels)])
    assert len(stream) - 1 - len(labels) < seq_len


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 200), st.integers(1, 50))
def test_pieces_of_a_document_hold_each_label_once(size, seq_len):
    document = np.arange(size)
    pieces = pack.cut_document(document, seq_len)
    assert max(map(len, pieces)) <= seq_len + 1
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
