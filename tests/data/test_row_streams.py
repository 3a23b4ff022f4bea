import math

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.row_streams import Part, RowStreams, streams_of_batch
from dsv3_jax.data.rows import FullRows

SIZES = st.integers(1, 24)


@given(SIZES, SIZES)
def test_each_part_of_a_batch_comes_from_its_part_of_the_streams(batch_size, num_streams):
    found = np.stack([streams_of_batch(n, batch_size=batch_size, num_streams=num_streams) for n in range(num_streams)])
    assert np.bincount(found.reshape(-1)).tolist() == [batch_size] * num_streams, "all of them equally often"
    for count in range(1, 25):
        if math.gcd(batch_size, num_streams) % count:
            continue
        for part in (Part(index, count) for index in range(count)):
            assert set(found[:, part.of(batch_size)].reshape(-1)) == set(range(num_streams)[part.of(num_streams)])


def test_a_batch_smaller_than_the_streams_goes_on_where_the_last_ended():
    found = [streams_of_batch(n, batch_size=4, num_streams=6).tolist() for n in range(4)]
    assert found == [[0, 1, 3, 4], [2, 0, 5, 3], [1, 2, 4, 5], [0, 1, 3, 4]]


@settings(deadline=None, max_examples=25)
@given(SIZES, SIZES, st.integers(0, 3), st.integers(1, 9))
def test_streams_read_the_pieces_in_turn_and_resume(batch_size, num_streams, first, seq_len):
    """Full rows, so that each is one piece."""
    pieces = (
        grain.MapDataset.range(7).repeat(None).map_with_index(lambda index, _: {"tokens": np.full(seq_len + 1, index)})
    )

    def batches(part=None):
        sizes = {"num_streams": num_streams, "batch_size": batch_size, "part": part or Part()}
        return iter(RowStreams(pieces, lambda part: FullRows(part, seq_len=seq_len), **sizes))

    whole, again = batches(), batches()
    seen = np.zeros(num_streams, int)
    for number in range(first):
        streams = streams_of_batch(number, batch_size=batch_size, num_streams=num_streams)
        for row, stream in zip(next(whole)["tokens"], streams, strict=True):
            assert set(row) == {stream + num_streams * seen[stream]}
            seen[stream] += 1
    again.set_state(whole.get_state())
    count = math.gcd(batch_size, num_streams)
    parts = [batches(Part(index, count)) for index in range(count)]
    for part in parts:
        part.set_state(whole.get_state())
    for _ in range(3):
        expected = next(whole)
        np.testing.assert_equal(next(again), expected)
        found = [next(part) for part in parts]
        np.testing.assert_equal({name: np.concatenate([one[name] for one in found]) for name in expected}, expected)
    joined = {number: state for part in parts for number, state in part.get_state()["streams"].items()}
    assert {**parts[0].get_state(), "streams": joined} == whole.get_state() == again.get_state()
