"""Arrays as the contiguous pieces of bytes that a file takes, made in one thread while another writes.

A matrix that is a transposed view is copied in strips of rows, small enough for the processor's cache, so that it needs
no second matrix. JAX's transfer transposes up to three times faster than NumPy.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

_PIECE_BYTES = 2**25
_STRIP_BYTES, _STRIP_ROWS = 2**21, 256
_SMALL_BYTES = 2**18
"""Below it NumPy is as fast."""


def strips(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of `array` in C order, in pieces."""
    if array.flags.c_contiguous:
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]
        return
    rows = max(_STRIP_ROWS, _STRIP_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield _contiguous(array[start : start + rows]).reshape(-1).view(np.uint8)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in another thread while the caller uses one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _contiguous(strip: np.ndarray) -> np.ndarray:
    host = _host()
    if host is None or strip.nbytes < _SMALL_BYTES:
        return np.ascontiguousarray(strip)
    return np.asarray(jax.device_put(strip, host))


@functools.cache
def _host() -> Any:
    """The processor as JAX sees it; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None
