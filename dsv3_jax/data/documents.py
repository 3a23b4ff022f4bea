"""A document: one text, checked, cut where it is too long."""

from collections.abc import Iterator
from typing import NamedTuple

LONGEST_DOCUMENT = 2**20
"""Bytes (characters in a record) after which a text is cut at the next line break into further documents."""

LONGEST_RECORD = 2**25
"""Bytes of the longest JSON record that is read; a record is read whole."""

BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """One text, named after its file (and record)."""

    name: str
    text: str


class Rejected(Exception):
    """A file or record that cannot become a document; the message says which, why and how to correct it."""


def decode(data: bytes, name: str, *, first_line: int = 1) -> str:
    """Text of UTF-8 that begins in line `first_line` of what `name` names.

    Raises:
        Rejected: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = first_line + data.count(b"\n", 0, e.start)
        raise Rejected(
            f"{name}, line {line}: byte 0x{data[e.start]:02x} at {e.start} is not UTF-8; convert it to UTF-8"
        ) from e


def field_of(record: object, field: str, name: str) -> str:
    """The text in a field of a JSON record.

    Raises:
        Rejected: there is no such field, or no text in it.
    """
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(sorted(record)[:8]) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise Rejected(f"{name}: no field {field!r} (found: {found}); set data.text_field to the field with the text")
    value = record[field]
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise Rejected(f"{name}: {field!r} holds {kind}, not text; write a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise Rejected(f"{name}: {field!r} holds half a surrogate pair at {e.start}; write whole characters") from e
    return value


def pieces(text: str) -> Iterator[str]:
    """Cuts a text into documents at line breaks, or at twice `LONGEST_DOCUMENT` characters where there are none."""
    start = 0
    while start < len(text):
        line_break = text.find("\n", start + LONGEST_DOCUMENT, start + 2 * LONGEST_DOCUMENT)
        end = line_break + 1 or start + 2 * LONGEST_DOCUMENT
        yield text[start:end]
        start = end
