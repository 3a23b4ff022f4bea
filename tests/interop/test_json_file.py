"""JSON from outside: one sentence for whatever is wrong with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax.interop import json_file
from dsv3_jax.interop.json_file import CheckpointError, parse_json, read_json


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, 10**9)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "is missing"),
    "folder": (os.mkdir, "is not a plain file"),
    "pipe": (os.mkfifo, "is not a plain file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is not a plain file"),
    "dangling link": (lambda file: file.symlink_to("gone"), "is a link to a file that is missing"),
    "link to itself": (lambda file: file.symlink_to(file), "link"),
    "empty": (lambda file: file.write_bytes(b""), "is not JSON"),
    "cut": (lambda file: file.write_text('{"a": [1, 2'), "is not JSON"),
    "list": (lambda file: file.write_text("[1]"), "must be a JSON object, not list"),
    "not UTF-8": (lambda file: file.write_bytes(b'{"a": "\xff"}'), "is not JSON .*utf-8"),
    "UTF-16": (lambda file: file.write_text('{"a": 1}', encoding="utf-16"), "is not JSON .*utf-8"),
    "byte order mark": (lambda file: file.write_text("{}", encoding="utf-8-sig"), "is not JSON .*BOM"),
    "one name twice": (lambda file: file.write_text('{"b": [{"a": 1, "a": 2}]}'), "it gives 'a' twice"),
    "many digits": (lambda file: file.write_text('{"a": %s}' % ("9" * 10_000)), "is not JSON"),
    "deep lists": (lambda file: file.write_text("[" * 200_000), "nested deeper than 32"),
    "deep objects": (lambda file: file.write_text(nested(100_000)), "nested deeper than 32"),
    "deep for a program": (lambda file: file.write_text(nested(33)), "nested deeper than 32"),
    "longer than is read": (sparse, "1,000,000,000 bytes long"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, name):
    make, message = BROKEN[name]
    file = tmp_path / "config.json"
    make(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_unreadable_and_impossible_names(tmp_path, monkeypatch):
    for name in ("x" * 5000, "a\0b", "\ud800"):
        with pytest.raises(CheckpointError):
            read_json(tmp_path / name)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"config.json: cannot be opened \(Permission denied\)"):
        read_json(tmp_path / "config.json")


def test_whatever_else_json_holds_arrives():
    value = {"text": "ä\u2028", "deep": json.loads(nested(30)), "list": [None, True, 1.5, -3, 1e300], "": {}}
    assert parse_json(json.dumps(value).encode(), name="it") == value
    assert json_file.shorten("x" * 300).endswith("x... (300 characters)")
