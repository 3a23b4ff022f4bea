import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import tokenizer
from dsv3_jax.data.token_split import split_at_line_breaks

LINES = ["if f(a):\n    g(b)\n", "for c in d:\n    e = [c]\n", "h(i);\nj = k\n", "class L:\n\n    m = (n)\n"]
TEXT = "".join(LINES * 20)


@pytest.fixture(scope="module")
def code_tokenizer() -> tokenizer.TextTokenizer:
    return tokenizer.train((line * n for n in range(50) for line in LINES), vocab_size=400)


def test_halves_spell_the_whole_and_cut_at_the_line_break(code_tokenizer):
    halves = code_tokenizer.line_break_halves
    splittable = np.flatnonzero(halves[:, 0] >= 0)
    assert splittable.size
    for i in splittable:
        whole, first, second = (code_tokenizer.decode([one]) for one in (i, *halves[i]))
        assert whole == first + second
        assert first.strip()
        assert "\n" not in first
        assert second[0] in "\r\n"


@settings(deadline=None, max_examples=30)
@given(rate=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_the_text_stays_the_same(code_tokenizer, rate, seed):
    ids = code_tokenizer.encode(TEXT)
    found = split_at_line_breaks(ids, code_tokenizer.line_break_halves, rate=rate, rng=np.random.default_rng(seed))
    assert code_tokenizer.decode(found) == TEXT


def test_the_rate_is_the_share_that_is_split(code_tokenizer):
    ids, halves = code_tokenizer.encode(TEXT * 50), code_tokenizer.line_break_halves
    num_splittable = int((halves[ids, 0] >= 0).sum())

    def num_split(rate):
        return len(split_at_line_breaks(ids, halves, rate=rate, rng=np.random.default_rng(0))) - len(ids)

    assert num_split(0.0) == 0
    assert num_split(1.0) == num_splittable
    assert 0.25 < num_split(0.3) / num_splittable < 0.35
