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


def test_document_mask_stops_labels_at_joints_and_padding():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    batch = pack.as_batch(tokens, segments, positions)
    np.testing.assert_array_equal(batch["tokens"], [[5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batch["targets"], [[6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(batch["loss_mask"], [[1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0, 1]])


def test_without_segments_labels_run_over_joints():
    batch = pack.as_batch(np.array([[5, 1, 0, 8]]))
    np.testing.assert_array_equal(batch["loss_mask"], [[1, 1, 1]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2]])
    assert all(value.dtype == np.int32 for value in batch.values())


def test_mtp_labels_by_the_documented_rule_never_cross_documents():
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]])
    tokens = segments * 100 + np.arange(10)
    batch = pack.as_batch(tokens, segments)
    T = batch["tokens"].shape[1]
    for k in (1, 2, 3):
        here, there = slice(0, T - k), slice(k, T)
        same = batch["segment_ids"][:, here] == batch["segment_ids"][:, there]
        valid = same & (batch["loss_mask"][:, there] == 1)
        labels = batch["targets"][:, there]
        np.testing.assert_array_equal((labels // 100)[valid], (batch["tokens"][:, here] // 100)[valid])
        expected = [t + 1 + k < 10 and segments[0, t] == segments[0, t + 1 + k] != 0 for t in range(T - k)]
        np.testing.assert_array_equal(valid[0], expected)


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
