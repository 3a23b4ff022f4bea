"""What a run learns from: every document once an epoch, its pieces in an order drawn over the whole corpus."""

import collections
import itertools

import numpy as np
import pytest

from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import fim
from dsv3_jax.data.build_folder import prepare
from dsv3_jax.data.pieces import Documents, shuffled_pieces


def documents_of(prepared, *, fim_rate=0.5, token_split_rate=0.1, seed=7, **settings) -> Documents:
    rates = {"fim_rate": fim_rate, "token_split_rate": token_split_rate}
    return Documents(prepared.train, prepared.tokenizer, **rates, seed=seed, **settings)


def text_of(document, tokenizer) -> tuple[str, bool]:
    """Its text with fill-in-the-middle undone, and whether it had it."""
    assert document[0] == tokenizer.bos_id
    assert document[-1] == tokenizer.eos_id
    body = document[1:-1]
    if body.size and body[0] == tokenizer.fim.begin:
        return "".join(tokenizer.decode(part) for part in fim.disassemble(body, ids=tokenizer.fim)), True
    return tokenizer.decode(body), False


def test_a_document_stays_itself_and_its_share_is_rearranged(prepared):
    documents, size = documents_of(prepared), len(prepared.train)
    found = [text_of(documents.get(i, epoch), prepared.tokenizer) for epoch in range(2) for i in range(size)]
    assert [text for text, _ in found] == 2 * [prepared.tokenizer.decode(prepared.train[i]) for i in range(size)]
    assert 0.3 < np.mean([has_fim for _, has_fim in found]) < 0.7
    plain = documents_of(prepared, fim_rate=0.0)
    assert not any(text_of(plain.get(i, 0), prepared.tokenizer)[1] for i in range(size))


def test_what_happens_to_a_document_depends_on_seed_document_and_epoch(prepared):
    def all_of(epoch, step=1, **settings):
        documents = documents_of(prepared, **settings)
        return {i: documents.get(i, epoch).tolist() for i in range(len(prepared.train))[::step]}

    first = all_of(0)
    assert first == all_of(0, step=-1)
    assert first != all_of(1)
    assert first != all_of(0, seed=8)


def test_the_rate_is_the_share_of_line_breaks_that_are_split(model, tmp_path):
    lines = ["if f(a):\n    g(b)\n", "for c in d:\n    e = [c]\n", "h(i);\nj = k\n", "class L:\n\n    m = (n)\n"]
    (tmp_path / "code.txt").write_text("".join(lines * 300))
    found = prepare(DataConfig(paths=(str(tmp_path / "code.txt"),)), model, tmp_path / "run", log=lambda line: None)

    def num_whole(rate):
        documents = documents_of(found, fim_rate=0.0, token_split_rate=rate)
        halves = found.tokenizer.line_break_halves
        return sum(int((halves[documents.get(i, 0), 0] >= 0).sum()) for i in range(len(found.train)))

    whole = {rate: num_whole(rate) for rate in (0.0, 0.3, 1.0)}
    assert whole[0.0] > 200
    assert 0.6 < whole[0.3] / whole[0.0] < 0.8
    assert whole[1.0] == 0


@pytest.mark.parametrize("seq_len", [7, 61, 5000])
def test_every_epoch_has_each_label_of_each_document_once_in_an_order_of_its_own(prepared, seq_len):
    documents = documents_of(prepared)
    pieces = shuffled_pieces(documents, seq_len=seq_len, seed=3)
    size = int((documents.num_full_rows(seq_len) + 1).sum())

    def labels(parts):
        return collections.Counter(pair for tokens in parts for pair in itertools.pairwise(tokens.tolist()))

    orders = []
    for epoch in range(2):
        found = [pieces[epoch * size + i]["tokens"] for i in range(size)]
        expected = [documents.get(i, epoch) for i in range(len(prepared.train))]
        assert labels(found) == labels(expected)
        orders.append([tokens.tolist() for tokens in found])
        full = np.array([len(tokens) == seq_len + 1 for tokens in found])
        assert full.sum() >= 0.9 * documents.num_full_rows(seq_len).sum()
    assert orders[0] != orders[1]
    again = shuffled_pieces(documents_of(prepared), seq_len=seq_len, seed=3)
    assert orders[1][size // 2] == again[size + size // 2]["tokens"].tolist(), "by random access"


def test_neighbours_come_from_the_whole_corpus(prepared):
    """The pieces of a long document are spread like those of a shuffled deck."""
    documents = documents_of(prepared, fim_rate=0.0, token_split_rate=0.0)
    longest = int(np.argmax(prepared.train.lengths()))
    num = documents.num_full_rows(16)
    size = int((num + 1).sum())
    pieces = shuffled_pieces(documents, seq_len=16, seed=0)
    document = documents.get(longest, 0)
    own = {tuple(document[start : start + 17]) for start in range(0, 16 * num[longest], 16)}
    others = collections.Counter(
        tuple(documents.get(i, 0)[start : start + 17])
        for i in range(len(num))
        if i != longest
        for start in range(0, 16 * num[i], 16)
    )
    places = [i for i in range(size) if (key := tuple(pieces[i]["tokens"])) in own and key not in others]
    assert len(places) > 20
    assert np.histogram(places, bins=4, range=(0, size))[0].min() > len(places) / 12


def test_memory_holds_few_documents(prepared):
    """No more tokens than it is told to, and the same documents with none at all."""
    few, none = documents_of(prepared, cached_tokens=9000), documents_of(prepared, cached_tokens=0)
    for i in np.random.default_rng(0).integers(0, len(prepared.train), 100).tolist():
        np.testing.assert_array_equal(few.get(i, 0), none.get(i, 0))
        assert sum(map(len, few._cache.values())) == few._cached <= 9000
    assert len(few._cache) > 1
    assert not none._cache


def test_a_document_that_grew_or_shrank_is_whole(prepared):
    """Splitting every line break makes documents longer than their number of pieces supposes."""
    documents = documents_of(prepared, fim_rate=1.0, token_split_rate=1.0)
    size = int((documents.num_full_rows(10) + 1).sum())
    pieces = shuffled_pieces(documents, seq_len=10, seed=0)
    found = sum(len(pieces[i]["tokens"]) - 1 for i in range(size))
    assert found == sum(len(documents.get(i, 0)) - 1 for i in range(len(prepared.train)))
