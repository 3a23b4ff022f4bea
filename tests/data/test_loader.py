import collections
import dataclasses
import json

import grain
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import fim, loader, pack, tokenizer
from dsv3_jax.data.build_folder import prepare
from dsv3_jax.data.rows import JoinedRows

MASKS = pytest.mark.parametrize("document_mask", [False, True])


def _iterator(cfg, prepared, *, batch_size=3, seq_len=32, mtp_depth=1, seed=7, **settings):
    return loader.make_train_iterator(
        cfg,
        prepared.tokenizer,
        prepared.train,
        batch_size=batch_size,
        seq_len=seq_len,
        mtp_depth=mtp_depth,
        seed=seed,
        **settings,
    )


def _same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@MASKS
@pytest.mark.parametrize("shuffle_rows", [1, 32])
@pytest.mark.parametrize("steps", [0, 1, 17])
def test_a_restored_iterator_gives_the_very_next_batches(cfg, prepared, document_mask, shuffle_rows, steps):
    cfg = dataclasses.replace(cfg, document_mask=document_mask, shuffle_rows=shuffle_rows)
    first, second = _iterator(cfg, prepared), _iterator(cfg, prepared)
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(20)]
    for _ in range(3):  # what the fresh iterator did before does not matter
        next(second)
    second.set_state(state)
    assert all(_same(batch, next(second)) for batch in expected)
    assert second.get_state() == first.get_state()
    first.close()
    second.close()


@MASKS
def test_every_row_can_be_resumed_at(cfg, prepared, document_mask):
    cfg = dataclasses.replace(cfg, document_mask=document_mask, shuffle_rows=1, prefetch_batches=0)
    batches = _iterator(cfg, prepared, batch_size=1, seq_len=61)
    other = _iterator(cfg, prepared, batch_size=1, seq_len=61)
    for _ in range(150):
        state = json.loads(json.dumps(batches.get_state()))
        other.set_state(state)
        assert _same(next(batches), next(other))


def test_the_state_survives_a_checkpoint_of_orbax(cfg, prepared, tmp_path):
    first, second = _iterator(cfg, prepared), _iterator(cfg, prepared)
    for _ in range(5):
        next(first)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(1, {"data": first})
        expected = [next(first) for _ in range(5)]
        checkpointer.load_checkpointables(1, {"data": second})
    assert all(_same(batch, next(second)) for batch in expected)
    first.close()
    second.close()


def test_streamed_rows_equal_the_plain_twin():
    sizes = [3, 1, 8, 4, 4, 12, 1, 1, 5]
    documents = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(sizes)]
    for seq_len in (1, 2, 3, 4, 7):
        stream = grain.MapDataset.source(documents).to_iter_dataset()
        rows = [row["tokens"] for row in JoinedRows(stream, seq_len=seq_len)]
        np.testing.assert_array_equal(rows, pack.join_and_cut(documents, seq_len))


def test_without_masks_a_batch_is_a_cut_of_the_joined_documents(cfg, prepared):
    documents = _epochs(cfg, prepared, 1)
    batches = _iterator(dataclasses.replace(cfg, shuffle_rows=1), prepared, batch_size=4)
    found = [next(batches) for _ in range(3)]
    batches.close()
    expected = pack.join_and_cut(documents, 32)[:12]
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in found]), expected[:, :-1])
    np.testing.assert_array_equal(np.concatenate([batch.labels[0] for batch in found]), expected[:, 1:])
    for batch in found:
        assert (batch.weights[0] == 1).all()
        assert batch.segment_ids is batch.positions is batch.num_bytes is None


def test_masked_rows_hold_whole_documents_apart(cfg, prepared):
    cfg = dataclasses.replace(cfg, document_mask=True)
    batches = _iterator(cfg, prepared, batch_size=8, seq_len=256)
    for _ in range(5):
        batch = next(batches)
        segments, tokens = batch.segment_ids, batch.tokens
        starts = np.diff(segments, axis=1, prepend=0) != 0
        real = segments > 0
        assert (batch.positions[starts & real] == 0).all()
        steps = np.diff(batch.positions, axis=1)
        assert (steps[(segments[:, 1:] == segments[:, :-1]) & real[:, 1:]] == 1).all()
        assert (batch.weights[0][~real] == 0).all()
        assert (tokens[~real] == prepared.tokenizer.pad_id).all()
        ends = real[:, :-1] & (segments[:, :-1] != segments[:, 1:])
        assert (batch.weights[0][:, :-1][ends] == 0).all()
        assert not (tokens == prepared.tokenizer.eos_id)[batch.weights[0] == 1].any()
        assert batch.weights[0].mean() > 0.6
    batches.close()


def _texts_of(documents, tokenizer):
    """Documents with fill-in-the-middle undone, and how many had it."""
    texts, num_fim = [], 0
    for document in documents:
        assert document[0] == tokenizer.bos_id
        assert document[-1] == tokenizer.eos_id
        body = document[1:-1]
        if body.size and body[0] == tokenizer.fim.begin:
            num_fim += 1
            texts.append("".join(tokenizer.decode(part) for part in fim.disassemble(body, ids=tokenizer.fim)))
        else:
            texts.append(tokenizer.decode(body))
    return texts, num_fim


def _epochs(cfg, prepared, num_epochs, **settings):
    """Documents of the first epochs, in order, straight from the stream of rows."""
    tokenizer = prepared.tokenizer
    plain = dataclasses.replace(cfg, document_mask=False, shuffle_rows=1)
    batches = _iterator(plain, prepared, batch_size=1, seq_len=512, **settings)
    count, size = settings.get("process_count", 1), len(prepared.train)
    wanted = num_epochs * len(range(settings.get("process_index", 0), size, count))
    stream: list[int] = []
    while stream.count(tokenizer.eos_id) < wanted:
        stream.extend(next(batches).tokens[0].tolist())
    batches.close()
    tokens = np.array(stream)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)[:wanted] + 1
    return np.split(tokens[: ends[-1]], ends[:-1])


def test_an_epoch_holds_every_document_once_and_epochs_differ(cfg, prepared):
    size = len(prepared.train)
    documents = _epochs(cfg, prepared, 2)
    texts, num_fim = _texts_of(documents, prepared.tokenizer)
    expected = collections.Counter(prepared.tokenizer.decode(prepared.train[i]) for i in range(size))
    assert collections.Counter(texts[:size]) == expected
    assert collections.Counter(texts[size:]) == expected
    assert texts[:size] != texts[size:]
    assert 0.3 * 2 * size < num_fim < 0.7 * 2 * size


def test_what_happens_to_a_document_depends_on_seed_document_and_epoch(cfg, prepared):
    size = len(prepared.train)

    def forms(documents):
        return dict(zip(_texts_of(documents, prepared.tokenizer)[0], (tuple(d) for d in documents), strict=True))

    both = _epochs(cfg, prepared, 2)
    again = _epochs(cfg, prepared, 2)
    other = _epochs(cfg, prepared, 1, seed=8)
    halves = [d for i in range(2) for d in _epochs(cfg, prepared, 1, process_index=i, process_count=2)]
    assert [tuple(d) for d in both] == [tuple(d) for d in again]
    assert forms(both[:size]) == forms(halves)
    assert forms(both[:size]) != forms(both[size:])
    assert forms(both[:size]) != forms(other)


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_share_each_epoch_out(cfg, prepared, process_count):
    parts = [_epochs(cfg, prepared, 1, process_index=i, process_count=process_count) for i in range(process_count)]
    texts = [text for part in parts for text in _texts_of(part, prepared.tokenizer)[0]]
    expected = [prepared.tokenizer.decode(prepared.train[i]) for i in range(len(prepared.train))]
    assert collections.Counter(texts) == collections.Counter(expected)


@MASKS
def test_a_single_document_feeds_an_endless_stream(model, tmp_path, document_mask):
    (tmp_path / "book.txt").write_text("".join(f"Line {n} of a book.\n" for n in range(300)))
    cfg = DataConfig(paths=(str(tmp_path / "book.txt"),), document_mask=document_mask, shuffle_rows=4)
    found = prepare(cfg, model, tmp_path / "run", say=lambda line: None)
    batches = _iterator(cfg, found, batch_size=4, seq_len=100)
    assert sum(next(batches).weights[0].mean() for _ in range(50)) > 25
    batches.close()


def test_rate_zero_leaves_documents_alone(cfg, prepared):
    _, num_fim = _texts_of(_epochs(dataclasses.replace(cfg, fim_rate=0.0), prepared, 1), prepared.tokenizer)
    assert num_fim == 0


def test_the_rate_is_the_share_of_line_breaks_that_are_split(model, tmp_path):
    lines = ["if f(a):\n    g(b)\n", "for c in d:\n    e = [c]\n", "h(i);\nj = k\n", "class L:\n\n    m = (n)\n"]
    (tmp_path / "code.txt").write_text("".join(lines * 300))
    cfg = DataConfig(paths=(str(tmp_path / "code.txt"),), fim_rate=0.0)
    found = prepare(cfg, model, tmp_path / "run", say=lambda line: None)

    def num_whole(rate):
        documents = _epochs(dataclasses.replace(cfg, token_split_rate=rate), found, 1)
        return sum(int((found.tokenizer.line_break_halves[document, 0] >= 0).sum()) for document in documents)

    whole = {rate: num_whole(rate) for rate in (0.0, 0.3, 1.0)}
    assert whole[0.0] > 200
    assert 0.6 < whole[0.3] / whole[0.0] < 0.8
    assert whole[1.0] == 0


def test_rows_are_shuffled_within_windows_of_the_configured_size(cfg, prepared):
    def first_rows(shuffle_rows):
        batches = _iterator(dataclasses.replace(cfg, shuffle_rows=shuffle_rows), prepared, batch_size=8)
        rows = [row for _ in range(8) for row in next(batches).tokens.tolist()]
        batches.close()
        return rows

    plain, shuffled = first_rows(1), first_rows(32)
    for window in (slice(0, 32), slice(32, 64)):
        assert shuffled[window] != plain[window]
        assert sorted(shuffled[window]) == sorted(plain[window])


def test_more_processes_than_documents_are_refused(cfg, prepared):
    with pytest.raises(UserError, match="cannot feed 1000 processes"):
        _iterator(cfg, prepared, process_count=1000)


@pytest.mark.parametrize(("seq_len", "overlap"), [(16, 0.0), (16, 0.5), (300, 0.5), (5000, 0.25)])
def test_heldout_pays_for_every_byte_and_every_end_once(prepared, seq_len, overlap):
    labels, num_bytes = [], 0
    for batch in loader.heldout_batches(
        prepared.tokenizer, prepared.heldout, batch_size=4, seq_len=seq_len, overlap=overlap
    ):
        assert batch.tokens.shape == batch.weights.shape[1:] == (4, seq_len)
        labels.append(batch.labels[batch.weights == 1])
        num_bytes += int(batch.num_bytes.sum())
        assert (batch.segment_ids[batch.weights[0] == 1] == 1).all()
    texts = list(prepared.heldout_texts())
    assert num_bytes == sum(map(len, texts)) == prepared.counts["heldout"]["bytes"]
    tokenizer = prepared.tokenizer
    expected = [[*prepared.heldout[i].astype(int), tokenizer.eos_id] for i in range(len(prepared.heldout))]
    assert sorted(np.concatenate(labels).tolist()) == sorted(i for ids in expected for i in ids)


def test_without_bos_texts_begin_with_their_first_token(cfg, prepared, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(prepared.tokenizer.to_json(), encoding="utf-8")
    without = tokenizer.load(file, bos_id=None)
    assert without.prompt("def") == prepared.tokenizer.prompt("def")[1:] == without.encode("def").tolist()
    labels = [
        batch.labels[batch.weights == 1]
        for batch in loader.heldout_batches(without, prepared.heldout, batch_size=4, seq_len=32, overlap=0.5)
    ]
    expected = [[*prepared.heldout[i].astype(int)[1:], without.eos_id] for i in range(len(prepared.heldout))]
    assert sorted(np.concatenate(labels).tolist()) == sorted(i for ids in expected for i in ids)
    cfg = dataclasses.replace(cfg, fim_rate=0.0, token_split_rate=0.0, shuffle_rows=1)
    batches = _iterator(cfg, dataclasses.replace(prepared, tokenizer=without), batch_size=1, seq_len=40)
    assert prepared.tokenizer.bos_id not in next(batches).tokens
    batches.close()


def test_heldout_is_shared_out_in_equal_numbers_of_batches(prepared):
    def batches(**settings):
        found = loader.heldout_batches(prepared.tokenizer, prepared.heldout, seq_len=64, **settings)
        return list(found)

    whole = batches(batch_size=6)
    parts = [batches(batch_size=2, process_index=i, process_count=3) for i in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for number, batch in enumerate(whole):
        for name, value in batch._asdict().items():
            found = [getattr(part[number], name) for part in parts]
            np.testing.assert_array_equal(np.concatenate(found, axis=-1 if name == "num_bytes" else -2), value)
    assert len(batches(batch_size=6, max_batches=2)) == 2


def test_settings_are_validated():
    for settings in (
        {"fim_rate": 1.5},
        {"token_split_rate": -0.1},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"heldout_overlap": 1.0},
        {"shuffle_rows": 0},
        {"prefetch_batches": -1},
        {"paths": ("",)},
        {"text_field": ""},
        {"tokenizer": ""},
        {"tokenizer_sample_bytes": 0},
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            DataConfig(**settings)
