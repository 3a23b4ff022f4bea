"""Text files and JSON lines, read in pieces of bounded size."""

import codecs
import io
import json
from collections.abc import Callable, Iterator

from dsv3_jax.data.documents import LONGEST_DOCUMENT, LONGEST_RECORD, Rejected, decode, field_of


def read_text(stream: io.BufferedReader, name: str) -> Iterator[str]:
    """A text, cut at the line break after each `LONGEST_DOCUMENT` bytes, between characters where there is none.

    Raises:
        Rejected: something is not UTF-8; what came before has been read.
    """
    line = 1
    while part := stream.read(LONGEST_DOCUMENT):
        part += stream.readline(LONGEST_DOCUMENT)
        for _ in range(3):  # an endless line may have been cut inside a character
            part += stream.read(1) if stream.peek(1)[:1] and stream.peek(1)[0] & 0xC0 == 0x80 else b""
        yield decode(part, name, first_line=line)
        line += part.count(b"\n")


def read_json_lines(
    stream: io.BufferedReader, name: str, field: str, reject: Callable[[str], None]
) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank; other lines than records with text in `field` are rejected."""
    number = 0
    while line := stream.readline(LONGEST_RECORD):
        number += 1
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            reject(f"{name}, line {number}: longer than {LONGEST_RECORD:,} bytes; split the record")
            while (rest := stream.readline(LONGEST_RECORD)) and not rest.endswith(b"\n"):
                pass
            continue
        try:
            text = decode(line.removeprefix(codecs.BOM_UTF8), name, first_line=number)
            if text.strip():
                yield number, field_of(_parse(text, f"{name}, line {number}"), field, f"{name}, line {number}")
        except Rejected as e:
            reject(str(e))


def _parse(line: str, name: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise Rejected(f"{name}: not JSON ({e}); put one JSON object on each line") from e
