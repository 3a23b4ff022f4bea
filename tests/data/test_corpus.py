import codecs
import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.data import corpus, json_file, streams, text_file
from dsv3_jax.data.documents import LONGEST_DOCUMENT


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


def _zst(data):
    return pa.compress(data, codec="zstd", asbytes=True)


LINES = b'{"text": "x"}\n\n{"text": "y"}'
MARK = codecs.BOM_UTF8
GOOD = {
    "array.json": b'[{"text": "x", "n": [1, {}]},\n {"text": "y"}]\n',
    "pretty.json": json.dumps([{"text": "x"}, {"text": "y"}], indent=4).encode(),
    "lines.json": LINES,
    "joined.json": b'{"text": "x"}{"text": "y"}',
    "marked.json": MARK + b'[{"text": "\xef\xbb\xbfx"}, {"text": "y"}]',
    "lines.ndjson": LINES,
    "marked.jsonl": MARK + b'{"text": "x"}\n' + MARK + b'{"text": "y"}',
    "a.jsonl.gz": gzip.compress(LINES),
    "two.jsonl.GZ": gzip.compress(LINES[:14]) + gzip.compress(LINES[14:]),
    "a.jsonl.zst": _zst(MARK + LINES),
    "two.jsonl.zst": _zst(LINES[:14]) + _zst(LINES[14:]),
    "a.json.zst": _zst(b'[{"text": "x"}, {"text": "y"}]'),
}


@pytest.mark.parametrize("name", GOOD)
def test_records_are_read_however_they_are_packed(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    documents, tally = _read(tmp_path)
    assert [document.text for document in documents] == ["x", "y"]
    assert tally == corpus.Tally()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_records_may_end_anywhere_in_what_is_read_at_once(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", chunk)
    texts = ["", "a", "{[\\", "世界" * 9, "\n"]
    (tmp_path / "a.json").write_text(json.dumps([{"n": -1.5e3, "text": text} for text in texts], ensure_ascii=False))
    documents, tally = _read(tmp_path)
    assert [document.text for document in documents] == texts[1:]
    assert tally.num_empty == 1


def test_texts_are_unpacked_and_lose_their_byte_order_mark(tmp_path):
    text = "a line äöü\n" * (LONGEST_DOCUMENT // 8)
    (tmp_path / "a.txt").write_bytes(MARK + b"x")
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(text.encode(), 1))
    (tmp_path / "c.md.zst").write_bytes(_zst(MARK + b"y"))
    (tmp_path / "d.txt").write_bytes(MARK)
    documents, tally = _read(tmp_path)
    found = [document.text for document in documents]
    assert [found[0], "".join(found[1:-1]), found[-1]] == ["x", text, "y"]
    assert len(found) > 3
    assert tally.num_empty == 1


TEXT_COLUMNS = {
    "string": pa.array(["p", "q"]),
    "large_string": pa.array(["p", "q"], pa.large_string()),
    "string_view": pa.array(["p", "q"], pa.string_view()),
    "binary": pa.array([b"p", b"q"], pa.binary()),
    "dictionary": pa.array(["p", "q"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TEXT_COLUMNS)
def test_parquet_columns_of_any_kind_of_text_are_read(tmp_path, kind):
    parquet.write_table(pa.table({"text": TEXT_COLUMNS[kind]}), tmp_path / "a.parquet")
    documents, _ = _read(tmp_path)
    assert [document.text for document in documents] == ["p", "q"]


def test_parquet_takes_memory_for_a_few_rows_not_for_a_group(tmp_path):
    text = "a line of a long text\n" * 40_000
    parquet.write_table(pa.table({"text": [text] * 80}), tmp_path / "a.parquet")  # a dictionary of one: 70 MB of text
    cfg, most = DataConfig(paths=(str(tmp_path),)), 0
    before = pa.total_allocated_bytes()
    for _ in corpus.read(cfg, corpus.list_files(cfg), corpus.Tally()):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 30e6


def test_folders_globs_and_files_are_read_once_each_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "image.png", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    documents, _ = _read(tmp_path / "b.txt", tmp_path, str(tmp_path / "**" / "*.py"))
    assert [document.text for document in documents] == ["b.txt", "a.md", "sub/c.py"]
    left_out = corpus.list_files(DataConfig(paths=(str(tmp_path),))).left_out
    assert [(names.count, len(names.examples)) for names in left_out.values()] == [(1, 1), (1, 1)]


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
    "broken.json": (b'[{"text": "a"}, {"text" "b"}]', r"broken.json, record 2: not JSON \(Expecting ':' delimiter\)"),
    "cut.json": (b'[{"text": "a"}', r"cut.json: the array ends after record 1 without \]"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', r"comma.json: ',' is missing after record 1"),
    "deep.json": (b'[{"text": "a"}, ' + b"[" * 100_000, r"deep.json, record 2: not JSON"),
    "nofield.json": (b'[{"text": "a"}, {"data": [{"text": "b"}]}]', r"record 2: no field 'text' \(found: data\)"),
    "latin1.json": (b'[{"text": "\xef"}]', r"latin1.json: byte 0xef is not UTF-8"),
    "utf16.txt": ("text".encode("utf-16"), r"utf16.txt is UTF-16, by its byte order mark; convert it to UTF-8"),
    "utf16.jsonl": (codecs.BOM_UTF16_BE + "{}".encode("utf-16-be"), r"utf16.jsonl is UTF-16"),
    "utf32.txt": ("text".encode("utf-32"), r"utf32.txt is UTF-32"),
    "cut.txt.gz": (gzip.compress(b"text " * 99)[:-9], r"cut.txt.gz cannot be unpacked \(Compressed file ended"),
    "altered.txt.gz": (gzip.compress(b"text")[:-8] + bytes(8), r"altered.txt.gz cannot be unpacked \(CRC check failed"),
    "plain.txt.gz": (b"text", r"plain.txt.gz cannot be unpacked \(Not a gzipped file"),
    "cut.jsonl.zst": (_zst(LINES)[:-3], r"cut.jsonl.zst cannot be unpacked \(Truncated compressed stream"),
    "plain.jsonl.zst": (LINES, r"plain.jsonl.zst cannot be unpacked"),
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
    parquet.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(UserError, match=r"column 'text' holds int64, not text"):
        _read(file)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_bytes_in_parquet_that_are_not_utf8_are_named_by_row(tmp_path, kind, as_dictionary):
    column = pa.array([b"good", b"bad \xff", b"good"], pa.large_binary() if kind == pa.large_string() else pa.binary())
    column = pa.Array.from_buffers(kind, 3, column.buffers())
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": column.dictionary_encode() if as_dictionary else column}), file)
    with pytest.raises(UserError, match=r"a.parquet, row 2, line 1: byte 0xff at 4 is not UTF-8"):
        _read(file)
    documents, tally = _read(file, on_bad_file="skip")
    assert [document.text for document in documents] == ["good", "good"]
    assert len(tally.rejected) == 1


def test_what_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "LONGEST_RECORD", 100)
    monkeypatch.setattr(json_file, "LONGEST_RECORD", 100)
    long = json.dumps({"text": "a" * 200})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{long}\n{{"text": "y"}}\n{long}')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: longer than 100 bytes; split the record"):
        _read(tmp_path)
    documents, tally = _read(tmp_path, on_bad_file="skip")
    assert [document.text for document in documents] == ["x", "y"]
    assert len(tally.rejected) == 2
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", 50)
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"record 2: not JSON, or longer than 100 characters"):
        _read(tmp_path)
    monkeypatch.setattr(streams, "_ALWAYS_READ", 2**20)
    for name, data in (("b.txt.gz", gzip.compress(bytes(2**23))), ("b.txt.zst", _zst(bytes(2**23)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name} grows to more than 256 times its size"):
            _read(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.txt", "does not exist"),
        ("none*.txt", "matches no file"),
        ("a.bin", r"unknown suffix '.bin'"),
        ("a.bin.gz", r"unknown suffix '.gz'"),
        ("gone.txt", "is a link to nothing"),
        ("pipe.txt", "is neither a file nor a folder"),
        ("empty", "holds no file of a known kind"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(tmp_path, path, message):
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "a.bin.gz").write_bytes(b"x")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
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
    text = line * (3 * LONGEST_DOCUMENT // len(line.encode()) + 1)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    for name in ("a.txt", "b.jsonl"):
        documents, _ = _read(tmp_path / name)
        assert "".join(document.text for document in documents) == text
        assert max(len(document.text) for document in documents) <= 2 * LONGEST_DOCUMENT
        assert len(documents) > 1 or name == "b.jsonl"
        if "\n" in line:
            assert all(document.text.endswith("\n") for document in documents)


def test_a_fault_late_in_a_long_file_is_named_by_its_line(tmp_path):
    lines = 2 * LONGEST_DOCUMENT // 10
    (tmp_path / "a.txt").write_bytes(b"123456789\n" * lines + b"\xff\n")
    with pytest.raises(UserError, match=f"line {lines + 1}: byte 0xff"):
        _read(tmp_path / "a.txt")
