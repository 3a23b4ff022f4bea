"""JSON objects on disk, read without trust in what became of them."""

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; a byte order mark before it is no part of it.

    Raises:
        ValueError: it holds something else. The message says what, not in which file.
        OSError: it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is no plain file")
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def typed(found: dict[str, Any], key: str, kind: type) -> Any:
    """`found[key]`, which must be a `kind`; a truth value is no number.

    Raises:
        ValueError: it is missing or something else.
    """
    value = found.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"its {key!r} is no {kind.__name__}" if key in found else f"it has no {key!r}")
    return value
