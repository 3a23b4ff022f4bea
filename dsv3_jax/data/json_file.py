"""Records of a JSON file, parsed one after another however long the file is."""

import codecs
import io
import json
from collections.abc import Callable, Iterator

from dsv3_jax.data.documents import BYTE_ORDER_MARK, LONGEST_RECORD, Rejected, field_of

_CHUNK_BYTES = 2**20
_BETWEEN = " \t\r\n" + BYTE_ORDER_MARK


def read_json(
    stream: io.BufferedReader, name: str, field: str, reject: Callable[[str], None]
) -> Iterator[tuple[int, str]]:
    """Number and text of each record: elements of an array, or values that follow one another.

    Records without text in `field` are rejected.

    Raises:
        Rejected: what follows is not JSON, not UTF-8, or longer than `LONGEST_RECORD`; what came before has been read.
    """
    for number, value in _values(stream, name):
        try:
            yield number, field_of(value, field, f"{name}, record {number}")
        except Rejected as e:
            reject(str(e))


def _values(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, object]]:
    source = _Source(stream, name)
    number, is_in_array, is_first = 0, False, True
    while character := source.next_character():
        if not is_in_array and character == "[":
            is_in_array, is_first = True, True
            source.position += 1
        elif is_in_array and character == "]":
            is_in_array = False
            source.position += 1
        else:
            if is_in_array and not is_first:
                source.expect(",", number)
            is_first = False
            number += 1
            yield number, source.value(number)
    if is_in_array:
        raise Rejected(f"{name}: the array ends after record {number} without ]; write the file again")


class _Source:
    """What is known of the text: the part that is not parsed yet, from `position` in `text`."""

    def __init__(self, stream: io.BufferedReader, name: str):
        self.position = 0
        self._text = ""
        self._stream, self._name, self._is_at_end = stream, name, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            while self.position < len(self._text):
                if self._text[self.position] not in _BETWEEN:
                    return self._text[self.position]
                self.position += 1
            if self._is_at_end:
                return ""
            self._read(_CHUNK_BYTES)

    def expect(self, character: str, number: int) -> None:
        found = self.next_character()
        if found != character:
            raise Rejected(f"{self._name}: {character!r} is missing after record {number}; write the file again")
        self.position += 1

    def value(self, number: int) -> object:
        """The JSON value that begins here; more is read, always twice as much, until it is whole."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.position)
            except json.JSONDecodeError as e:
                if self._is_at_end:
                    raise Rejected(f"{self._name}, record {number}: not JSON ({e.msg}); write the file again") from e
            except (ValueError, RecursionError) as e:
                raise Rejected(f"{self._name}, record {number}: not JSON ({e}); write the file again") from e
            else:
                if end < len(self._text) or self._is_at_end:  # else a number may go on
                    self.position = end
                    return value
            known = len(self._text) - self.position
            if known > LONGEST_RECORD:
                raise Rejected(
                    f"{self._name}, record {number}: not JSON, or longer than {LONGEST_RECORD:,} characters; correct "
                    "or split it"
                )
            self._read(max(_CHUNK_BYTES, known))

    def _read(self, size: int) -> None:
        data = self._stream.read(size)
        self._is_at_end = len(data) < size
        try:
            new = self._decoder.decode(data, final=self._is_at_end)
        except UnicodeDecodeError as e:
            raise Rejected(
                f"{self._name}: byte 0x{e.object[e.start]:02x} is not UTF-8; convert the file to UTF-8"
            ) from e
        self._text, self.position = self._text[self.position :] + new, 0
