"""Opens a file of text as bytes: plain or compressed, without its byte order mark."""

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from dsv3_jax.config.paths import shown
from dsv3_jax.data.documents import Rejected

COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})

_MOST_EXPANSION = 256
_ALWAYS_READ = 2**28

_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def kind_of(file: Path) -> str:
    """The suffix that tells what a file holds, in lower case, without that of its compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator[io.BufferedReader]:
    """The content of a file, unpacked as it is read.

    Raises:
        Rejected: at the start or while reading: another encoding's byte order mark, a damaged or truncated archive, or
            one that grows to more than 256 MiB and 256 times its size.
        OSError: the file cannot be read.
    """
    with file.open("rb") as source:
        is_packed = file.suffix.lower() in COMPRESSED_SUFFIXES
        packed: Any = _Unpacked(source, file) if is_packed else None
        stream = io.BufferedReader(packed) if is_packed else source
        head = stream.peek(4)[:4]
        for mark, encoding in _OTHER_ENCODINGS:
            if head.startswith(mark):
                raise Rejected(f"{shown(file)} is {encoding}, by its byte order mark; convert it to UTF-8")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


class _Unpacked(io.RawIOBase):
    """The bytes in a .gz or .zst file."""

    def __init__(self, source: BinaryIO, file: Path):
        if file.suffix.lower() == ".gz":
            self._unpacked = gzip.GzipFile(fileobj=source, mode="rb")
        else:
            self._unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(source, "r"), "zstd")
        self._name = shown(file)
        self._left = max(_ALWAYS_READ, _MOST_EXPANSION * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            data = self._unpacked.read(len(buffer))
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as e:
            reason = str(e).splitlines()[0].removesuffix(".")
            raise Rejected(f"{self._name} cannot be unpacked ({reason}); get or write the file again") from e
        self._left -= len(data)
        if self._left < 0:
            raise Rejected(
                f"{self._name} grows to more than {_MOST_EXPANSION} times its size, which text does not; unpack it "
                "yourself if that is right"
            )
        buffer[: len(data)] = data
        return len(data)
