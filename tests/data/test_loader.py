import collections
import dataclasses
import itertools
import json

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import loader, tokenizer
from dsv3_jax.data.build_folder import prepare
from dsv3_jax.data.row_streams import Part

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
@pytest.mark.parametrize("steps", [0, 1, 17])
def test_a_restored_iterator_gives_the_very_next_batches(cfg, prepared, document_mask, steps):
    cfg = dataclasses.replace(cfg, document_mask=document_mask)
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
    cfg = dataclasses.replace(cfg, document_mask=document_mask, prefetch_batches=0)
    batches = _iterator(cfg, prepared, batch_size=1, seq_len=61)
    other = _iterator(cfg, prepared, batch_size=1, seq_len=61)
    for _ in range(60):
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


@MASKS
@pytest.mark.parametrize("count", [2, 4])
def test_parts_make_the_batches_of_one_process(cfg, prepared, document_mask, count):
    """Row by row, from one state, and what they save together is what one process saves."""
    cfg = dataclasses.replace(cfg, document_mask=document_mask, streams=12)
    whole = _iterator(cfg, prepared, batch_size=8)
    for _ in range(5):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    parts = [_iterator(cfg, prepared, batch_size=8, part=Part(index, count)) for index in range(count)]
    for part in parts:
        part.set_state(state)
    for _ in range(5):
        expected, found = next(whole), [next(part) for part in parts]
        for name, array in expected._asdict().items():
            if array is not None:
                joined = np.concatenate([getattr(batch, name) for batch in found], axis=-2)
                np.testing.assert_array_equal(joined, array)
    joined = {number: state for part in parts for number, state in part.get_state()["streams"].items()}
    assert {**parts[0].get_state(), "streams": joined} == whole.get_state()
    for batches in (whole, *parts):
        batches.close()


def test_parts_that_are_not_equal_are_refused(cfg, prepared):
    for wrong, name in ((3, "train.batch.micro=8"), (8, "data.streams=12")):
        with pytest.raises(UserError, match=f"{name} cannot be shared by {wrong} processes"):
            _iterator(dataclasses.replace(cfg, streams=12), prepared, batch_size=8, part=Part(0, wrong))


@MASKS
def test_an_epoch_of_batches_has_every_label_once(cfg, prepared, document_mask):
    """Up to what waits at its ends; the documents themselves are held to it in test_pieces.py."""
    cfg = dataclasses.replace(cfg, document_mask=document_mask, fim_rate=0.0, token_split_rate=0.0)
    batches = _iterator(cfg, prepared, batch_size=1, seq_len=16)
    documents = [prepared.train[i].astype(int) for i in range(len(prepared.train))]
    size = sum(len(document) + 1 for document in documents)
    found, num = collections.Counter(), 0
    while num < size:
        batch = next(batches)
        is_label = batch.weights[0] == 1
        found.update(zip(batch.tokens[is_label].tolist(), batch.labels[0][is_label].tolist(), strict=True))
        num += int(is_label.sum())
    batches.close()
    bos, eos = prepared.tokenizer.bos_id, prepared.tokenizer.eos_id
    framed = [[bos, *document.tolist(), eos] for document in documents]
    expected = collections.Counter(pair for ids in framed for pair in itertools.pairwise(ids))
    assert (found - expected).total() + (expected - found).total() < 0.03 * size


def test_without_masks_rows_are_full_and_no_mask_reaches_the_model(cfg, prepared):
    batches = _iterator(cfg, prepared, batch_size=4)
    for _ in range(30):
        batch = next(batches)
        assert batch.segment_ids is batch.positions is batch.num_bytes is None
        assert (batch.tokens != prepared.tokenizer.pad_id).all()
        is_joint = batch.weights[0] == 0
        assert is_joint.mean() < 0.1
        np.testing.assert_array_equal(batch.labels[0][:, :-1], batch.tokens[:, 1:])
    batches.close()


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


@MASKS
def test_a_single_document_feeds_an_endless_stream(model, tmp_path, document_mask):
    (tmp_path / "book.txt").write_text("".join(f"Line {n} of a book.\n" for n in range(300)))
    cfg = DataConfig(paths=(str(tmp_path / "book.txt"),), document_mask=document_mask)
    found = prepare(cfg, model, tmp_path / "run", log=lambda line: None)
    batches = _iterator(cfg, found, batch_size=4, seq_len=100)
    assert sum(next(batches).weights[0].mean() for _ in range(50)) > 25
    batches.close()


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
    cfg = dataclasses.replace(cfg, fim_rate=0.0, token_split_rate=0.0)
    batches = _iterator(cfg, dataclasses.replace(prepared, tokenizer=without), batch_size=1, seq_len=40)
    assert prepared.tokenizer.bos_id not in next(batches).tokens
    batches.close()


def test_heldout_batches_are_of_one_size_and_stop_at_a_bound(prepared):
    settings = {"batch_size": 6, "seq_len": 64}
    whole = list(loader.heldout_batches(prepared.tokenizer, prepared.heldout, **settings))
    assert len(whole) == loader.num_heldout_batches(prepared.tokenizer, prepared.heldout, **settings)
    assert {batch.tokens.shape for batch in whole} == {(6, 64)}
    assert len(list(loader.heldout_batches(prepared.tokenizer, prepared.heldout, **settings, max_batches=2))) == 2


def test_settings_are_validated():
    for settings in (
        {"fim_rate": 1.5},
        {"token_split_rate": -0.1},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"heldout_overlap": 1.0},
        {"prefetch_batches": -1},
        {"streams": 0},
        {"paths": ("",)},
        {"text_field": ""},
        {"tokenizer": ""},
        {"tokenizer_sample_bytes": 0},
    ):
        with pytest.raises(UserError, match=next(iter(settings))):
            DataConfig(**settings)
