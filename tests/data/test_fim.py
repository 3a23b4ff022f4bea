import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import fim

IDS = fim.FimIds(begin=3, hole=4, end=5)
TOKENS = st.lists(st.integers(6, 99), max_size=20).map(lambda ids: np.array(ids, np.int32))


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**32 - 1))
def test_split_loses_nothing_and_depends_on_the_generator_alone(text, seed):
    parts = fim.split(text, np.random.default_rng(seed))
    assert "".join(parts) == text
    assert parts == fim.split(text, np.random.default_rng(seed))


@settings(deadline=None)
@given(TOKENS, TOKENS, TOKENS)
def test_disassemble_is_the_inverse_of_assemble(prefix, middle, suffix):
    joined = fim.assemble(prefix, middle, suffix, ids=IDS)
    for found, expected in zip(fim.disassemble(joined, ids=IDS), (prefix, middle, suffix), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_psm_form_is_begin_prefix_hole_suffix_end_middle():
    joined = fim.assemble(np.array([10]), np.array([20, 21]), np.array([30]), ids=IDS)
    assert joined.tolist() == [3, 10, 4, 30, 5, 20, 21]


@pytest.mark.parametrize("tokens", [[], [3, 4], [4, 3, 5], [10, 3, 4, 5], [3, 4, 5, 5], [3, 5, 4]])
def test_disassemble_refuses_what_is_not_in_the_form(tokens):
    with pytest.raises(ValueError, match="PSM form"):
        fim.disassemble(np.array(tokens, np.int32), ids=IDS)


def test_recovers_the_document_through_the_tokenizer(small_tokenizer):
    text = "def f(x):\n    return x  # Grüße 世界\n" * 3
    ids = small_tokenizer.fim
    for seed in range(20):
        parts = fim.split(text, np.random.default_rng(seed))
        joined = fim.assemble(*(small_tokenizer.encode(part) for part in parts), ids=ids)
        assert "".join(small_tokenizer.decode(part) for part in fim.disassemble(joined, ids=ids)) == text
