"""JSON objects that somebody else wrote, read without trust in them."""

import json
import os
from io import BufferedReader
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import UserError

MAX_BYTES = 100_000_000
"""The longest JSON that is read: the limit of the safetensors format for its header, ten times the largest index."""

MAX_DEPTH = 32
"""Objects and lists inside one another; the deepest in a released checkpoint folder is a tokenizer's with eight."""


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or not what its configuration says."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint folder, such as config.json, an index or tokenizer.json.

    Raises: `CheckpointError` naming the file when it is missing, is no plain file, cannot be read, is longer than
        `MAX_BYTES`, or is not what `parse_json` reads.
    """
    with open_file(file) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise CheckpointError(
                    f"{file}: is {size:,} bytes long, but JSON is read up to {MAX_BYTES:,}; fetch it again."
                )
            data = stream.read(size)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}); fetch it again.") from error
    return parse_json(data, name=f"{file}:")


def open_file(file: Path) -> BufferedReader:
    """Opens a plain file for reading.

    Raises: `CheckpointError` when it is missing or cannot be opened, or is something else: a folder, or a pipe, whose
        opening would wait for a writer.
    """
    try:
        if not file.is_file():
            if file.exists():
                raise CheckpointError(f"{file}: is not a plain file; put the file of the checkpoint there.")
            problem = "is a link to a file that is missing" if file.is_symlink() else "is missing"
            raise CheckpointError(f"{file}: {problem}; fetch it again.")
        return file.open("rb")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror}); check its permissions.") from error
    except ValueError as error:  # a name with a zero byte or half a surrogate pair
        raise CheckpointError(f"{str(file)!r} is not the name of a file ({error}); correct it.") from error


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """The JSON object in `data`, which messages call `name`.

    Raises: `CheckpointError` when it is not UTF-8, not JSON, no object, nested deeper than `MAX_DEPTH`, or gives a
        name of one object twice, which two readers may understand in two ways.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise _too_deep(name) from None
    except MemoryError:
        raise CheckpointError(
            f"{name} {len(data):,} bytes of JSON do not fit into memory; fetch it again or free memory."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({shorten(str(error))}); fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must be a JSON object, not {type(value).__name__}; fetch it again.")
    _check_depth(value, name)
    return value


def shorten(text: str, length: int = 200) -> str:
    """`text`, or its beginning when it is long: what a message quotes from a file."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it gives {shorten(repr(twice))} twice")
    return result


def _check_depth(value: Any, name: str) -> None:
    """By levels, so that it needs no recursion itself."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep(name)


def _too_deep(name: str) -> CheckpointError:
    return CheckpointError(f"{name} is nested deeper than {MAX_DEPTH} levels, which no such file is; fetch it again.")
