import grain
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.data.rows import FullRows


def rows_of(sizes: list[int], seq_len: int, num: int) -> tuple[list[dict], list[np.ndarray], list[int]]:
    """The first rows of endlessly repeated pieces, the pieces, and the labels of what waits for the next row.

    No two tokens of one repetition are equal.
    """
    pieces = [np.arange(size) + 1000 * i for i, size in enumerate(sizes)]
    source = grain.MapDataset.range(len(pieces)).repeat(None).map_with_index(lambda _, i: {"tokens": pieces[i]})
    rows = iter(FullRows(source, seq_len=seq_len))
    first = [next(rows) for _ in range(num)]
    state = rows.get_state()
    waiting = [source[index]["tokens"][1:] for index in state["waiting"]]
    return first, pieces, np.concatenate([[], *waiting])[state["offset"] :].tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 20))
@example([2, 16], 15)
def test_every_label_of_every_piece_is_in_one_row_or_waits(sizes, seq_len):
    num_labels = sum(max(0, size - 1) for size in sizes)
    if num_labels == 0:
        return
    num = 4 + 3 * (num_labels + len(sizes)) // seq_len
    rows, pieces, labels = rows_of(sizes, seq_len, num)
    for row in rows:
        tokens, segments = row["tokens"], row["tokens_segment_ids"]
        assert len(tokens) == len(segments) == seq_len + 1
        assert segments[0] == 1
        assert set(np.diff(segments)) <= {0, 1}
        labels += tokens[1:][segments[1:] == segments[:-1]].tolist()
    expected = sorted(token for piece in pieces for token in piece[1:].tolist())
    counts = np.array([labels.count(token) for token in expected])
    assert set(labels) == set(expected)
    assert counts.max() - counts.min() <= 1, "one after another"


def test_a_piece_of_a_rows_size_is_a_row_and_others_are_joined_around_it():
    rows, *_ = rows_of([3, 5, 4, 2], seq_len=4, num=3)
    np.testing.assert_array_equal(rows[0]["tokens"], [1000, 1001, 1002, 1003, 1004])
    np.testing.assert_array_equal(rows[1]["tokens"], [0, 1, 2, 2000, 2001])
    np.testing.assert_array_equal(rows[1]["tokens_segment_ids"], [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(rows[2]["tokens"], [2001, 2002, 2003, 3000, 3001])


@pytest.mark.parametrize("seq_len", [1, 6])
def test_a_state_is_small(seq_len):
    pieces = grain.MapDataset.range(10).repeat(None).map(lambda i: {"tokens": np.arange(i)})
    rows = iter(FullRows(pieces, seq_len=seq_len))
    for _ in range(50):
        next(rows)
        state = rows.get_state()
        assert set(state) == {"next_piece", "waiting", "offset"}
        assert len(state["waiting"]) <= 3
