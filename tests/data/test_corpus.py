import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import corpus


def _read(*paths, **settings):
    cfg = DataConfig(paths=tuple(map(str, paths)), **settings)
    tally = corpus.Tally()
    return list(corpus.read(cfg, corpus.list_files(cfg), tally)), tally


def test_default_corpus_is_the_standard_library_without_tests():
    listing = corpus.list_files(DataConfig())
    names = [listing.name(file) for file in listing.files]
    assert "argparse.py" in names
    assert "asyncio/events.py" in names
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    tally = corpus.Tally()
    assert sum(len(document.text) for document in corpus.read(DataConfig(), listing, tally)) > 5_000_000
    assert not tally.rejected


def test_text_jsonl_and_parquet_give_one_document_a_file_line_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y\\n", "other": 1}\n')
    parquet.write_table(pa.table({"text": ["p", "q"], "n": [1, 2]}), tmp_path / "c.parquet")
    documents, tally = _read(tmp_path)
    assert [document.text for document in documents] == ["one\r\ntwo\n", "x", "y\n", "p", "q"]
    assert documents[2].name.endswith("b.jsonl:3")
    assert tally == corpus.Tally()


def test_folders_globs_and_files_are_read_once_each_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "image.png", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    documents, _ = _read(tmp_path / "b.txt", tmp_path, str(tmp_path / "**" / "*.py"))
    assert [document.text for document in documents] == ["b.txt", "a.md", "sub/c.py"]
    assert corpus.list_files(DataConfig(paths=(str(tmp_path),))).num_ignored == 1


def test_the_field_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    parquet.write_table(pa.table({"content": ["p"]}), tmp_path / "b.parquet")
    documents, _ = _read(tmp_path, text_field="content")
    assert [document.text for document in documents] == ["x", "p"]


BAD = {
    "latin1.txt": ("fine\nna\xefve\n".encode("latin-1"), r"latin1.txt, line 2: byte 0xef at 7 is not UTF-8"),
    "empty.txt": (b"", r"empty.txt is empty"),
    "notjson.jsonl": (b'{"text": "a"}\n{"text": \n', r"notjson.jsonl, line 2: not JSON"),
    "nofield.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2: no field 'text' \(found: body, id\)"),
    "list.jsonl": (b"[1]\n", r"line 1: no field 'text' \(found: a list\)"),
    "number.jsonl": (b'{"text": 3}\n', r"line 1: 'text' holds a int, not text"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xef"}\n', r"latin1.jsonl, line 2: byte 0xef at 10"),
    "half.jsonl": (json.dumps({"text": "a\ud800"}).encode(), r"line 1: 'text' holds half a surrogate pair at 1"),
    "corrupt.parquet": (b"PAR1 nothing PAR1", r"corrupt.parquet is no readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_or_skipped_and_counted(tmp_path, name):
    content, message = BAD[name]
    file, good = tmp_path / name, tmp_path / "good.txt"
    file.write_bytes(content)
    good.write_text("good")
    with pytest.raises(UserError, match=message) as refused:
        _read(file, good)
    assert "data.on_bad_file=skip" in str(refused.value)
    documents, tally = _read(file, good, on_bad_file="skip")
    assert documents[-1].text == "good"
    assert len(tally.rejected) == 1


def test_bad_rows_of_parquet_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", None, "c"]}), file)
    with pytest.raises(UserError, match=r"row 2: 'text' holds nothing"):
        _read(file)
    documents, tally = _read(file, on_bad_file="skip")
    assert [document.text for document in documents] == ["a", "c"]
    assert len(tally.rejected) == 1
    with pytest.raises(UserError, match=r"no column 'body' \(found: text\)"):
        _read(file, text_field="body")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "does not exist"),
        ("none*.txt", "matches no file"),
        ("a.bin", r"unknown suffix '.bin'"),
        ("empty", "holds no file of a known kind"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(tmp_path, path, message):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        _read(tmp_path / path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    file.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        _read(file)


def test_empty_documents_found_in_folders_are_counted(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    documents, tally = _read(tmp_path)
    assert [document.text for document in documents] == ["x"]
    assert tally.num_empty == 2


@pytest.mark.parametrize("line", ["some words äöü\n", "界"])
def test_long_texts_are_cut_at_lines_or_between_characters(tmp_path, line):
    text = line * (3 * corpus.LONGEST_DOCUMENT // len(line.encode()) + 1)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    for name in ("a.txt", "b.jsonl"):
        documents, _ = _read(tmp_path / name)
        assert "".join(document.text for document in documents) == text
        assert max(len(document.text) for document in documents) <= 2 * corpus.LONGEST_DOCUMENT
        assert len(documents) > 1 or name == "b.jsonl"
        if "\n" in line:
            assert all(document.text.endswith("\n") for document in documents)


def test_a_fault_late_in_a_long_file_is_named_by_its_line(tmp_path):
    lines = 2 * corpus.LONGEST_DOCUMENT // 10
    (tmp_path / "a.txt").write_bytes(b"123456789\n" * lines + b"\xff\n")
    with pytest.raises(UserError, match=f"line {lines + 1}: byte 0xff"):
        _read(tmp_path / "a.txt")
