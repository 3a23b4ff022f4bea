import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.build_folder import main, prepare
from dsv3_jax.data.folder import open_prepared


def _lines():
    said = []
    return said, said.append


def test_prepared_data_holds_the_corpus_split_by_content(prepared, folder_of_text):
    texts = {file.read_bytes() for file in folder_of_text.iterdir()}
    heldout = list(prepared.heldout_texts())
    train = [prepared.tokenizer.decode(prepared.train[i]).encode() for i in range(len(prepared.train))]
    assert sorted(heldout + train) == sorted(texts)
    assert heldout
    counts = prepared.counts["train"]
    assert counts["bytes"] == sum(map(len, train))
    assert counts["documents"] == len(prepared.train)
    assert counts["tokens"] == prepared.train.num_items


def test_prepared_once_it_is_opened_again_unchanged(cfg, model, tmp_path):
    said, log = _lines()
    first = prepare(cfg, model, tmp_path, log=log)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    said.clear()
    second = prepare(cfg, model, tmp_path, log=log)
    assert said == []
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npy")}
    assert second.counts == first.counts
    assert (tmp_path / "tokenizer.json").read_text() == (tmp_path / "data" / "tokenizer.json").read_text()


def test_the_same_corpus_gives_the_same_files(cfg, model, prepared, tmp_path):
    again = prepare(cfg, model, tmp_path, log=lambda line: None)
    names = sorted(file.relative_to(again.folder) for file in again.folder.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(prepared.folder) for file in prepared.folder.rglob("*") if file.is_file())
    for name in names:
        assert (again.folder / name).read_bytes() == (prepared.folder / name).read_bytes()


def test_the_digest_names_what_differs(cfg, model, prepared, small_tokenizer, tmp_path):
    def digest(name, **changes):
        return prepare(dataclasses.replace(cfg, **changes), model, tmp_path / name, log=lambda line: None).digest()

    file = tmp_path / "tokenizer.json"
    file.write_text(small_tokenizer.to_json(), encoding="utf-8")
    first = digest("first")
    assert first == prepared.digest() == json.loads(json.dumps(first))
    second = digest("second", tokenizer=str(file))
    assert all(first[part] != second[part] for part in ("tokenizer", "train", "heldout"))
    third = digest("third", tokenizer=str(file), heldout_fraction=0.4)
    assert [part for part in second if second[part] != third[part]] == ["train", "heldout"]


def test_changed_sources_are_reported_and_not_used(cfg, model, folder_of_text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder_of_text, source)
    cfg = dataclasses.replace(cfg, paths=(str(source),))
    said, log = _lines()
    before = prepare(cfg, model, tmp_path / "run", log=log)
    (source / "00.py").touch()  # another time, the same text
    said.clear()
    prepare(cfg, model, tmp_path / "run", log=log)
    assert said == []
    (source / "00.py").write_text("changed\n")
    assert prepare(cfg, model, tmp_path / "run", log=log).counts == before.counts
    assert "the sources have changed" in said[0]
    shutil.rmtree(source)
    assert prepare(cfg, model, tmp_path / "run", log=log).counts == before.counts
    assert "cannot be read now" in said[1]


def test_other_settings_are_refused_by_name(cfg, model, tmp_path):
    prepare(cfg, model, tmp_path, log=lambda line: None)
    other = dataclasses.replace(cfg, heldout_fraction=0.3)
    with pytest.raises(UserError, match=r"data.heldout_fraction: 0.2 -> 0.3.*another --run-dir"):
        prepare(other, model, tmp_path)
    with pytest.raises(UserError, match=r"model.vocab_size: 400 -> 500"):
        prepare(cfg, dataclasses.replace(model, vocab_size=500), tmp_path)
    prepare(dataclasses.replace(cfg, fim_rate=0.0, document_mask=True), model, tmp_path)


def test_a_shared_cache_serves_two_runs(cfg, model, tmp_path):
    shared = dataclasses.replace(cfg, cache_dir=str(tmp_path / "cache"))
    said, log = _lines()
    for run in ("a", "b"):
        prepare(shared, model, tmp_path / run, log=log)
        assert (tmp_path / run / "tokenizer.json").exists()
        assert not (tmp_path / run / "data").exists()
    assert sum("ready" in line for line in said) == 1


def test_home_is_known_in_every_setting(cfg, model, folder_of_text, small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").symlink_to(folder_of_text)
    (tmp_path / "tokenizer.json").write_text(small_tokenizer.to_json(), encoding="utf-8")
    at_home = dataclasses.replace(cfg, paths=("~/text",), tokenizer="~/tokenizer.json", cache_dir="~/cache")
    assert prepare(at_home, model, "~/run", log=lambda line: None).folder == tmp_path / "cache"
    assert {file.name for file in tmp_path.glob("[a-z~]*")} == {"text", "tokenizer.json", "cache", "run"}


def test_leftovers_of_a_killed_preparation_are_replaced(cfg, model, prepared, tmp_path):
    (tmp_path / ".data.partial" / "train").mkdir(parents=True)
    (tmp_path / ".data.partial" / "tokenizer.json").write_text("{")
    found = prepare(cfg, model, tmp_path, log=lambda line: None)
    assert found.counts == prepared.counts
    assert not (tmp_path / ".data.partial").exists()


def test_only_leftovers_of_a_preparation_are_removed(cfg, model, tmp_path):
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\.data\.partial is not what an unfinished preparation leaves behind"):
        prepare(cfg, model, tmp_path, log=lambda line: None)
    assert (tmp_path / ".data.partial" / "thesis.txt").read_text() == "mine"


def test_a_given_up_preparation_is_taken_over(cfg, model, prepared, tmp_path, monkeypatch):
    """As at a signal: the thread that prepares is left alone at some point, and goes on for a while."""
    reached, given_up = threading.Event(), threading.Event()
    train = tokenizer.train

    def slow(*args, **kwargs):
        reached.set()
        given_up.wait()
        return train(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "train", slow)
    results, said = [], []
    threads = [
        threading.Thread(target=lambda: results.append(prepare(cfg, model, tmp_path, log=said.append).digest()))
        for _ in range(2)
    ]
    threads[0].start()
    reached.wait()
    threads[1].start()
    while not any("waiting for another process" in line for line in said):
        time.sleep(0.01)
    assert not (tmp_path / "data").exists()
    given_up.set()
    for thread in threads:
        thread.join()
    assert results == [prepared.digest()] * 2
    assert sum("ready in" in line for line in said) == 1


def test_a_folder_of_something_else_is_left_alone(cfg, model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than prepared data"):
        prepare(cfg, model, tmp_path)
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


DAMAGED = {
    "manifest.json": (lambda text: text[:-2], "manifest.json is damaged"),
    "tokenizer.json": (lambda text: text.replace('"1.0"', '"1.1"'), "tokenizer.json was altered after it was written"),
    "train/index.json": (lambda text: "[]", "does not hold readable shards .it holds a list, not an object"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_was_damaged_is_refused(cfg, model, prepared, tmp_path, name):
    change, message = DAMAGED[name]
    folder = shutil.copytree(prepared.folder, tmp_path / "data")
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(UserError, match=message):
        prepare(cfg, model, tmp_path)


def test_shards_of_other_data_are_refused(cfg, model, prepared, tmp_path):
    folder = shutil.copytree(prepared.folder, tmp_path / "data")
    shutil.rmtree(folder / "heldout")
    shutil.copytree(folder / "train", folder / "heldout")
    with pytest.raises(UserError, match="heldout has not the documents that manifest.json says"):
        prepare(cfg, model, tmp_path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["manifest.json", "train/index.json", "heldout/index.json"]))
def test_only_user_errors_leave_whatever_stands_in_the_files(cfg, model, prepared, tmp_path, data, name):
    folder = tmp_path / "data"
    if not folder.exists():
        shutil.copytree(prepared.folder, folder)
    whole = (prepared.folder / name).read_bytes()
    content = node = json.loads(whole)
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANYTHING)
    cut = data.draw(st.none() | st.integers(0, 200))
    try:
        (folder / name).write_bytes(json.dumps(content).encode()[:cut])
        with contextlib.suppress(UserError):
            open_prepared(cfg, model, folder)
    finally:
        (folder / name).write_bytes(whole)


def test_a_full_disk_leaves_nothing_half_made(cfg, model, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(UserError, match="cannot be written"):
            prepare(cfg, model, tmp_path, log=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / ".data.partial").exists()
    prepare(cfg, model, tmp_path, log=lambda line: None)


def test_one_file_is_enough(model, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"Line {n} of a book.\n" for n in range(500)))
    found = prepare(DataConfig(paths=(str(file),)), model, tmp_path / "run", log=lambda line: None)
    assert len(found.train) == len(found.heldout) == 1
    [heldout] = found.heldout_texts()
    assert file.read_bytes().endswith(heldout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.txt": b""}, r"no text in .*1 empty documents"),
        ({"a.txt": b"x"}, r"too small to be split"),
        ({"a.txt": b"\xff", "b.txt": b"y" * 50}, r"line 1: byte 0xff at 0 is not UTF-8"),
    ],
)
def test_a_corpus_without_text_is_refused(model, tmp_path, content, message):
    source = tmp_path / "source"
    source.mkdir()
    for name, data in content.items():
        (source / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prepare(DataConfig(paths=(str(source),)), model, tmp_path / "run", log=lambda line: None)
    assert not (tmp_path / "run" / "data").exists()


def test_names_of_any_bytes_are_prepared_and_shown_on_any_terminal(model, folder_of_text, tmp_path):
    source = shutil.copytree(folder_of_text, tmp_path / os.fsdecode(b"caf\xe9"))
    (source / os.fsdecode(b"b\xe9\n.txt")).write_bytes(b"\xff")
    (source / os.fsdecode(b"\xe9.txt")).write_text("good text\n")
    said, log = _lines()
    for _ in range(2):
        prepare(DataConfig(paths=(str(source),), on_bad_file="skip"), model, tmp_path / "run", log=log)
    assert all(line.isprintable() for line in said)
    assert any(r"caf\xe9/b\xe9\n.txt, line 1: byte 0xff" in line for line in said)
    assert not any("changed" in line for line in said)


def test_a_corpus_of_which_everything_is_left_out_is_refused(model, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"no text in .*a\.txt, line 1: byte 0xff"):
        prepare(DataConfig(paths=(str(tmp_path),), on_bad_file="skip"), model, tmp_path / "run")


def test_what_is_skipped_is_said(model, folder_of_text, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    said, log = _lines()
    cfg = DataConfig(paths=(str(folder_of_text), str(bad)), on_bad_file="skip")
    prepare(cfg, model, tmp_path / "run", log=log)
    assert any("left out" in line and "bad.txt" in line for line in said)
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert len(manifest["left_out"]["rejected"]) == 1


def test_a_given_tokenizer_is_used(cfg, model, small_tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(small_tokenizer.to_json(), encoding="utf-8")
    chosen = dataclasses.replace(cfg, tokenizer=str(file))
    found = prepare(chosen, model, tmp_path / "run", log=lambda line: None)
    assert found.tokenizer.to_json() == small_tokenizer.to_json()
    with pytest.raises(UserError, match=r"has 400 tokens, more than vocab_size=300"):
        prepare(chosen, dataclasses.replace(model, vocab_size=300), tmp_path / "other", log=lambda line: None)


def test_a_tokenizer_that_loses_text_is_refused(cfg, model, small_tokenizer, tmp_path):
    lossy = json.loads(small_tokenizer.to_json())
    lossy["normalizer"] = json.loads(normalizers.Lowercase().__getstate__())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(lossy), encoding="utf-8")
    with pytest.raises(UserError, match="does not give back the text"):
        prepare(dataclasses.replace(cfg, tokenizer=str(file)), model, tmp_path / "run", log=lambda line: None)


def test_a_tokenizer_without_marks_needs_fim_off(cfg, model, tmp_path):
    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizer.decoders.ByteLevel()
    file = tmp_path / "tokenizer.json"
    inner.save(str(file))
    chosen = dataclasses.replace(cfg, tokenizer=str(file))
    with pytest.raises(UserError, match=r"set data\.fim_rate=0"):
        prepare(chosen, model, tmp_path / "run", log=lambda line: None)
    prepare(dataclasses.replace(chosen, fim_rate=0.0), model, tmp_path / "run", log=lambda line: None)


def test_bos_and_eos_must_be_where_a_trained_tokenizer_has_them(cfg, model, tmp_path):
    with pytest.raises(UserError, match=r"set model.bos_id=0"):
        prepare(cfg, dataclasses.replace(model, bos_id=5), tmp_path)


def test_two_processes_at_once_make_it_once(cfg, folder_of_text, tmp_path):
    program = (
        "import dataclasses, sys\n"
        "from dsv3_jax.config.data import DataConfig\n"
        "from dsv3_jax.config.model import ModelConfig\n"
        "from dsv3_jax.data.build_folder import prepare\n"
        "model = dataclasses.replace(ModelConfig(), vocab_size=400)\n"
        "print(prepare(DataConfig(paths=(sys.argv[1],)), model, sys.argv[2]).counts)\n"
    )
    command = [sys.executable, "-c", program, str(folder_of_text), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert len({lines.splitlines()[-1] for lines, _ in outputs}) == 1
    assert sum("ready in" in lines for lines, _ in outputs) == 1
    assert not any(errors for _, errors in outputs)


def test_the_command_prints_what_it_does(folder_of_text, tmp_path, capsys):
    chosen = ["--set", f"data.paths={folder_of_text}", "model.vocab_size=400"]
    assert main(["--config", "configs/tiny.py", "--run-dir", str(tmp_path), *chosen]) == 0
    out, err = capsys.readouterr()
    assert "learning 400 tokens" in out
    assert "ready in" in out
    assert err == ""


def test_the_command_reports_errors_with_exit_code_2(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "absent.py"), "--run-dir", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
