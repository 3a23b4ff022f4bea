"""Arrays as the contiguous pieces of bytes that a file takes, made in one thread while another writes.

A matrix that is a transposed view is copied in strips of rows, through a tile that stays in the processor's cache. The
tile's rows are a cache line longer than they hold: rows whose length is a power of two would fall on one another in the
cache, which makes transposing up to eight times slower. Strips lie in memory that is used again, as fresh pages cost as
much as the transposing.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_PIECE_BYTES = 2**25
_STRIP_BYTES = 2**21
_TILE_ROWS, _TILE_BYTES = 256, 2**18
_CACHE_LINE = 64


class Strips:
    """Makes the pieces of one array after another, each strip in the memory of the last but one."""

    def __init__(self) -> None:
        self._tile = np.empty(_TILE_BYTES, np.uint8)
        self._made = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def of(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """The bytes of `array` in C order, in pieces; each is overwritten when the next but one is made."""
        array = array if array.ndim == 2 else np.ascontiguousarray(array)
        if array.flags.c_contiguous:
            data = array.reshape(-1).view(np.uint8)
            for start in range(0, data.size, _PIECE_BYTES):
                yield data[start : start + _PIECE_BYTES]
            return
        bits = array.view(np.dtype(f"u{array.itemsize}"))  # NumPy moves them faster than bfloat16
        rows = max(1, _STRIP_BYTES * len(bits) // bits.nbytes // _TILE_ROWS) * _TILE_ROWS
        for start in range(0, len(bits), rows):
            yield self._contiguous(bits[start : start + rows])

    def _contiguous(self, rows: np.ndarray) -> np.ndarray:
        """The bytes of a matrix in C order."""
        if rows.nbytes > self._made[0].size:
            self._made[0] = np.empty(rows.nbytes, np.uint8)
        data = self._made[0][: rows.nbytes]
        self._made.reverse()
        strip = data.view(rows.dtype).reshape(rows.shape)
        for start in range(0, len(rows), _TILE_ROWS):
            self._copy(strip[start : start + _TILE_ROWS], rows[start : start + _TILE_ROWS])
        return data

    def _copy(self, strip: np.ndarray, rows: np.ndarray) -> None:
        """strip = rows"""
        pitch = len(rows) * rows.itemsize + _CACHE_LINE
        width = max(1, self._tile.size // pitch)
        tile = self._tile[: width * pitch].reshape(width, pitch)[:, :-_CACHE_LINE].view(rows.dtype)
        for start in range(0, rows.shape[1], width):
            columns = rows[:, start : start + width].T
            tile[: len(columns)] = columns
            strip[:, start : start + width] = tile[: len(columns)].T


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in another thread while the caller uses one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
