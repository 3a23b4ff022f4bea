"""Paths as users write them, and as messages show them."""

import os
from pathlib import Path

from dsv3_jax.config.check import ConfigError, check


def user_path(given: str | os.PathLike[str]) -> Path:
    """The path that `given` names; `~` and `~name` are home folders, also where no shell has expanded them.

    Raises:
        ConfigError: it is empty (a shell variable that is not set), or there is no such home folder.
    """
    check(os.fspath(given).strip() != "", "a path is empty; give a file or folder, or leave the setting out.")
    check("\0" not in os.fspath(given), f"{shown(given)}: a path holds no zero bytes; write it again.")
    try:
        os.fsencode(given)
        return Path(given).expanduser()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{shown(given)}: half a character cannot be in a path; write it again.") from e
    except RuntimeError as e:
        raise ConfigError(f"{shown(given)}: there is no such home folder; write the path out.") from e


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path for messages: bytes that are no UTF-8 and characters that do not print are escaped (`\xe9`, `\n`)."""
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(path))


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # how Python holds a byte of a name that it cannot decode
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode("ascii")
