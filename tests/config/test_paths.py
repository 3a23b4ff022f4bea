import os
from pathlib import Path

import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.paths import shown, user_path


def test_home_is_known_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/~b") == tmp_path / "a" / "~b"
    assert user_path(Path("a~")) == Path("a~")
    with pytest.raises(ConfigError, match="~nobody-of-this-name/x: there is no such home folder"):
        user_path("~nobody-of-this-name/x")
    for given, message in (("", "a path is empty"), (" ", "is empty"), ("a\0b", "zero bytes"), ("\ud800", "half a")):
        with pytest.raises(ConfigError, match=message):
            user_path(given)
    (tmp_path / "own.py").write_text(Path("configs/tiny.py").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_config("~/own.py") == load_config("configs/tiny.py")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"a/\xc3\xa9.txt", "a/é.txt"),
        (b"a/\xe9.txt", r"a/\xe9.txt"),
        (b"two\nlines\x1b[1m", r"two\nlines\x1b[1m"),
    ],
)
def test_a_name_of_any_bytes_is_shown(name, expected):
    assert shown(os.fsdecode(name)) == expected
    assert shown("\ud800") == r"\ud800"
