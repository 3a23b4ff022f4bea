import numpy as np
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


@settings(deadline=None)
@given(st.lists(st.text(min_size=2, max_size=30), min_size=2, max_size=30, unique=True))
def test_equal_documents_are_on_one_side(texts):
    hashes = np.array([split.content_hash(text) for text in texts], np.uint64)
    rule = split.plan(hashes, 0.3)
    for text in texts:
        assert "" in rule.parts(text)
        assert rule.parts(text) == rule.parts(str(text))


def test_the_side_of_a_document_does_not_depend_on_the_others():
    texts = [f"document {n}" for n in range(400)]
    hashes = np.array([split.content_hash(text) for text in texts], np.uint64)
    whole, half = split.plan(hashes, 0.1), split.plan(hashes[:200], 0.1)
    assert whole == half
    assert 20 <= sum(bool(whole.parts(text)[1]) for text in texts) <= 60


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {n}\n" for n in range(100))
    rule = split.plan(np.array([split.content_hash(text)], np.uint64), 0.1)
    train, heldout = rule.parts(text)
    assert train.endswith("\n")
    assert 0.07 < len(heldout) / len(text) < 0.13
