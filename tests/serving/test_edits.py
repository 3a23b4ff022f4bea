"""Tables of edits follow their sequences, and requests' parameters become their rows."""

import jax
import numpy as np
import pytest

from dsv3_jax.serving.edits import Edits, count, empty_edits, rows_of, set_row
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.request_rows import edit_row, has_edits, sampling_rows
from dsv3_jax.serving.sampler import sample
from dsv3_jax.serving.sequence import Sequence

V = 23
sample_jit = jax.jit(sample)


def sequence(seed: int = 0, num_generated: int = 5, stop_ids: tuple[int, ...] = (1, 7), **params) -> Sequence:
    rng = np.random.default_rng(seed)
    prompt = tuple(rng.integers(0, V, 6).tolist())
    out = Sequence(seed, prompt, SamplingParams(**params), 2**32 - 1 - seed, 99, frozenset(stop_ids))
    out.tokens.extend(rng.integers(0, V, num_generated).tolist())
    return out


def assert_same(found: Edits, expected: Edits) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_counting_drawn_tokens_equals_building_the_row_from_them() -> None:
    """Slots in any order; rows without a slot share the last row, which stays as it is."""
    table = empty_edits(4, V)
    neutral = rows_of(table, np.array([4]))
    neutral = jax.tree.map(np.asarray, neutral)
    sequences = [sequence(1, presence_penalty=1.0), sequence(2, logit_bias={3: -5.0}, repetition_penalty=1.3)]
    for slot, each in zip((2, 0), sequences, strict=True):
        table = set_row(table, slot, edit_row(each, V))
    rng = np.random.default_rng(0)
    for _ in range(6):
        tokens = rng.integers(0, V, 5).astype(np.int32)
        table = count(table, np.array([4, 2, 4, 0, 4], np.int32), tokens)
        sequences[0].tokens.append(int(tokens[1]))
        sequences[1].tokens.append(int(tokens[3]))
    rows = rows_of(table, np.array([2, 0, 4, 1]))
    expected = [edit_row(each, V) for each in sequences]
    assert_same(jax.tree.map(lambda x: x[:2], rows), jax.tree.map(lambda *x: np.stack(x), *expected))
    assert_same(jax.tree.map(lambda x: x[2:], rows), jax.tree.map(lambda x: np.repeat(x, 2, 0), neutral))


def test_a_row_without_edits_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 5, (2, V)).astype(np.float32)
    sequences = [sequence(3, temperature=0.8, top_k=9), sequence(4)]
    assert not any(has_edits(each) for each in sequences)
    how = sampling_rows(sequences, vocab_size=V)
    edits = rows_of(empty_edits(1, V), np.array([1, 1]))
    np.testing.assert_array_equal(sample_jit(logits, np.arange(2), how, edits), sample_jit(logits, np.arange(2), how))


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 0.9},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.1},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 1},
    ],
    ids=str,
)
def test_every_parameter_that_changes_logits_takes_a_row(params) -> None:
    assert has_edits(sequence(**params))


def test_min_tokens_without_stop_ids_takes_no_row() -> None:
    assert not has_edits(sequence(stop_ids=(), min_tokens=3))


def test_no_stop_id_before_so_many_tokens() -> None:
    each = sequence(num_generated=0, min_tokens=2)
    logits = np.zeros((3, V), np.float32)
    logits[:, 7] = 50
    edits = jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], 3, 0), edit_row(each, V))
    tokens = sample_jit(logits, np.array([6, 7, 8]), sampling_rows([each] * 3, vocab_size=V), edits)
    np.testing.assert_array_equal(tokens, [0, 0, 7])


def test_a_penalty_takes_the_likeliest_token_away_once_it_was_generated() -> None:
    each = sequence(num_generated=0, presence_penalty=2.0)
    logits = np.zeros((1, V), np.float32)
    logits[0, :3] = 3.0, 2.0, 1.5
    table, seen = set_row(empty_edits(1, V), 0, edit_row(each, V)), []
    how = sampling_rows([each], vocab_size=V)
    for position in range(6, 10):
        tokens = sample_jit(logits, np.array([position]), how, rows_of(table, np.array([0])))
        table = count(table, np.array([0]), tokens)
        seen.append(int(tokens[0]))
    assert seen == [0, 1, 2, 0]


def test_numbers_past_float32_stay_finite() -> None:
    """Each is a valid request's: tokens come out, and the neighbour's are what they are alone."""
    odd = [
        {"temperature": 1e300},
        {"temperature": 1e-300},
        {"temperature": 1.0, "repetition_penalty": 1e300},
        {"temperature": 1.0, "repetition_penalty": 1e-300, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1e-300, "min_p": 1e-300, "top_k": 2**70},
    ]
    sequences = [sequence(9, num_generated=20, **params) for params in [*odd, {"temperature": 1.0}]]
    logits = np.random.default_rng(2).normal(0, 5, (6, V)).astype(np.float32)
    edits = jax.tree.map(lambda *x: np.stack(x), *[edit_row(each, V) for each in sequences])
    positions = np.full(6, 26)
    tokens = np.asarray(sample_jit(logits, positions, sampling_rows(sequences, vocab_size=V), edits))
    assert ((tokens >= 0) & (tokens < V)).all()
    assert (
        tokens[1] == tokens[4].item() if logits[1].argmax() == logits[4].argmax() else tokens[1] == logits[1].argmax()
    )
    alone = sample_jit(logits[5:], positions[5:], sampling_rows(sequences[5:], vocab_size=V))
    assert alone[0] == tokens[5]
