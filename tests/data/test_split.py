import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import split


@settings(deadline=None)
@given(st.lists(st.text(min_size=2, max_size=30), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_both_sides_have_text_and_nothing_is_lost(texts, fraction):
    hashes = np.array([split.content_hash(text) for text in texts], np.uint64)
    rule = split.plan(hashes, fraction)
    parts = [rule.parts(text) for text in texts]
    assert ["".join(part) for part in parts] == texts
    assert any(part[0] for part in parts)
    assert any(part[1] for part in parts)


def test_equal_documents_are_on_one_side():
    texts = [f"document {n % 50}" for n in range(200)]
    rule = split.plan(np.array([split.content_hash(text) for text in texts], np.uint64), 0.3)
    sides = {(text, bool(rule.parts(text)[1])) for text in texts}
    assert len(sides) == 50
    assert rule.tail_fraction is None


def test_the_side_of_a_document_does_not_depend_on_the_others():
    texts = [f"document {n}" for n in range(400)]
    hashes = np.array([split.content_hash(text) for text in texts], np.uint64)
    whole, half = split.plan(hashes, 0.1), split.plan(hashes[:200], 0.1)
    assert whole == half
    assert 20 <= sum(bool(whole.parts(text)[1]) for text in texts) <= 60


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_are_cut_at_a_line_each(count):
    texts = ["".join(f"line {n} of {i}\n" for n in range(100)) for i in range(count)]
    rule = split.plan(np.array([split.content_hash(text) for text in texts], np.uint64), 0.01)
    for train, heldout in map(rule.parts, texts):
        assert train.endswith("\n")
        assert 0.005 < len(heldout) / (len(train) + len(heldout)) < 0.02
