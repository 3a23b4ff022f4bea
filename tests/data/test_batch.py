import jax
import numpy as np
import pytest

from dsv3_jax.data.batch import Batch, make_batch, stack


def test_document_mask_stops_labels_at_joints_and_padding():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    batch = make_batch(tokens, segments, positions)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batch.labels, [[[6, 7, 8, 9, 0]]])
    np.testing.assert_array_equal(batch.weights, [[[1, 1, 0, 1, 0]]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1]])


@pytest.mark.parametrize("seq_len", [1, 2, 13])
def test_labels_of_a_depth_never_cross_a_document_or_the_row(seq_len):
    rng = np.random.default_rng(seq_len)
    segments = np.sort(rng.integers(0, 4, (5, seq_len + 1)), axis=1)[:, ::-1]
    tokens = rng.integers(1, 99, (5, seq_len + 1))
    batch = make_batch(tokens, segments, mtp_depth=2)
    for k, b, t in np.ndindex(3, 5, seq_len):
        inside = t + 1 + k <= seq_len and segments[b, t] != 0 and segments[b, t] == segments[b, t + 1 + k]
        assert batch.weights[k, b, t] == inside, (k, b, t)
        if inside:
            assert batch.labels[k, b, t] == tokens[b, t + 1 + k]


def test_without_segments_every_label_in_the_row_counts_and_nothing_masks():
    batch = make_batch(np.array([[5, 1, 0, 8]]), mtp_depth=1)
    np.testing.assert_array_equal(batch.labels, [[[1, 0, 8]], [[0, 8, 0]]])
    np.testing.assert_array_equal(batch.weights, [[[1, 1, 1]], [[1, 1, 0]]])
    assert batch.segment_ids is batch.positions is batch.num_bytes is None
    assert [array.dtype for array in batch[:3]] == [np.int32, np.int32, np.float32]


def test_stacked_batches_are_a_pytree_with_one_axis_more():
    one = make_batch(np.arange(14).reshape(2, 7), mtp_depth=1)
    both = stack([one, one._replace(tokens=one.tokens + 1)])
    assert isinstance(both, Batch)
    assert [leaf.shape for leaf in jax.tree.leaves(both)] == [(2, 2, 6), (2, 2, 2, 6), (2, 2, 2, 6)]
    np.testing.assert_array_equal(both.tokens[1], one.tokens + 1)
