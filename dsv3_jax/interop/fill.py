"""The way of official tensors into our stacks: read, converted and transposed in chunks, on every core.

A chunk of rows goes from the file into a buffer that stays in the processor's cache, and from there to its place, so
the only memory touched beside the model is a few buffers. The buffer's rows are a cache line longer than the tensor's:
rows whose length is a power of two would fall on one another in the cache, which makes transposing three times slower.
"""

import contextlib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, NamedTuple

import numpy as np

from dsv3_jax.interop.convert import official_view
from dsv3_jax.interop.json_file import CheckpointError, open_file
from dsv3_jax.interop.match import Found
from dsv3_jax.interop.safetensors_io import DTYPES
from dsv3_jax.model.params import ParamSpec
from dsv3_kernels.quantize import QTensor, dequantize_tiles

_CHUNK_BYTES, _MIN_ROWS, _MAX_ROWS = 2**21, 64, 512
_BATCH_BYTES = 2**24
_CACHE_LINE = 64
_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


def fill(
    arrays: dict[str, np.ndarray],
    found: list[Found],
    block: tuple[int, int] | None,
    *,
    advance: Callable[[int], None],
) -> None:
    """Brings every tensor of `found` to its place in `arrays`, all zeros; `advance` is told the bytes read.

    Raises: `CheckpointError` when a file has shrunk or cannot be read.
    """
    workers = _num_cores()
    buffers: SimpleQueue[_Buffers] = SimpleQueue()
    for _ in range(workers):
        buffers.put(_Buffers(_Buffer(), _Buffer()))
    for file, items in itertools.groupby(sorted(found, key=_place_on_disk), key=lambda item: item.tensor.file):
        with open_file(file) as stream, _threads(workers) as pool:

            def work(batch: list[_Part], stream: BinaryIO = stream) -> int:
                own = buffers.get()
                try:
                    for part in batch:
                        _fill_part(arrays, part, block, stream, own)
                finally:
                    buffers.put(own)
                return sum(part.num_bytes for part in batch)

            for num_bytes in pool.map(work, _batches(items, block)):
                advance(num_bytes)


@contextlib.contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped when the first error, or a signal, ends the block."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Part(NamedTuple):
    """Rows `start` to `stop` of a tensor."""

    item: Found
    start: int
    stop: int
    num_bytes: int


class _Buffer:
    """Memory for one chunk, and the views of its rows that a scattered read needs, remembered for each width."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._views: dict[int, tuple[np.ndarray, list[memoryview]]] = {}

    def rows(self, count: int, row_bytes: int) -> tuple[np.ndarray, list[memoryview]]:
        """([count, row_bytes], its rows); what it held before is lost."""
        if row_bytes not in self._views or count > len(self._views[row_bytes][1]):
            pitch = -(-row_bytes // _CACHE_LINE) * _CACHE_LINE + _CACHE_LINE
            if count * pitch > self._memory.size:
                self._memory = _zeros((count * pitch,), np.dtype(np.uint8))
                self._views.clear()
            padded = self._memory[: count * pitch].reshape(count, pitch)[:, :row_bytes]
            self._views[row_bytes] = padded, [memoryview(row) for row in padded]
        padded, rows = self._views[row_bytes]
        return padded[:count], rows[:count]


class _Buffers(NamedTuple):
    """One thread's: a chunk as it is stored, and converted."""

    raw: _Buffer
    converted: _Buffer


def zeros(specs: dict[str, ParamSpec]) -> dict[str, np.ndarray]:
    """An array for each spec, at a multiple of 64 bytes, which JAX takes over on a CPU without a copy.

    Raises: MemoryError when there is no room for one.
    """
    with _threads(_num_cores()) as pool:
        return dict(zip(specs, pool.map(lambda spec: _zeros(spec.shape, spec.dtype), specs.values()), strict=True))


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Its pages come from the system at once, a third cheaper than one by one as they are first written to."""
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, max(size, 1), flags=_MEMORY)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size:,} bytes: {error}") from None
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place_on_disk(item: Found) -> tuple[Path, int]:
    return item.tensor.file, item.tensor.start


def _batches(items: Iterator[Found], block: tuple[int, int] | None) -> Iterator[list[_Part]]:
    """Parts of tensors, together large enough for a thread to be worth its switch, small enough to share the work."""
    batch: list[_Part] = []
    filled = 0
    for item in items:
        rows, row_bytes = _rows(item), _row_bytes(item)
        step = _whole_blocks(item, max(1, _BATCH_BYTES // max(1, row_bytes)), block)
        for start in range(0, rows, step):
            part = _Part(item, start, min(start + step, rows), (min(start + step, rows) - start) * row_bytes)
            batch.append(part)
            filled += part.num_bytes
            if filled >= _BATCH_BYTES:
                yield batch
                batch, filled = [], 0
    if batch:
        yield batch


def _fill_part(
    arrays: dict[str, np.ndarray], part: _Part, block: tuple[int, int] | None, stream: BinaryIO, buffers: _Buffers
) -> None:
    item, row_bytes = part.item, _row_bytes(part.item)
    entry, tensor = item.entry, item.tensor
    stack, stored = arrays[entry.path], DTYPES[tensor.dtype]
    if tensor.dtype == "BF16" and stack.dtype == np.float32:  # the upper half of a float32; the lower is zero, as here
        stack, stored = stack.view(np.uint16)[..., 1::2], np.dtype(np.uint16)
    target = official_view(stack[entry.index], entry.input_axes)
    target = target if target.ndim > 1 else target[None]
    step = min(max(_CHUNK_BYTES // 4 // max(1, row_bytes), 128), _CHUNK_BYTES // max(1, row_bytes), _MAX_ROWS)
    step = max(step // 16 * 16, _MIN_ROWS)
    step = _whole_blocks(item, step, block)
    for start in range(part.start, part.stop, step):
        stop = min(start + step, part.stop)
        raw, rows = buffers.raw.rows(stop - start, row_bytes)
        _read(stream, item, rows, row_bytes, tensor.start + start * row_bytes)
        chunk = raw.view(stored)
        if item.scale is not None and block is not None:
            scales = item.scale.read(start // block[0], -(-stop // block[0]))
            chunk = np.asarray(dequantize_tiles(QTensor(chunk, scales), tile=block))
        if item.scale is not None or chunk.dtype != target.dtype:
            chunk = _convert(chunk, target.dtype, buffers.converted)
        bits = np.dtype(f"u{target.dtype.itemsize}")  # NumPy moves them faster than bfloat16, which it does not know
        target[start:stop].view(bits)[...] = chunk.view(bits)


def _read(stream: BinaryIO, item: Found, rows: list[memoryview], row_bytes: int, offset: int) -> None:
    tensor = item.tensor
    for first in range(0, len(rows), _MAX_ROWS):
        some = rows[first : first + _MAX_ROWS]
        size = len(some) * row_bytes
        try:
            done = os.preadv(stream.fileno(), some, offset)
        except OSError as error:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} cannot be read ({error.strerror}); fetch the file again."
            ) from error
        if done != size:
            raise CheckpointError(
                f"{tensor.file}: ends inside tensor {tensor.name!r} ({offset - tensor.start + done} of "
                f"{tensor.stop - tensor.start} bytes); fetch the file again."
            )
        offset += size


def _convert(chunk: np.ndarray, dtype: np.dtype, buffer: _Buffer) -> np.ndarray:
    """The chunk in `dtype`, in `buffer`."""
    rows, columns = chunk.shape
    converted = buffer.rows(rows, columns * dtype.itemsize)[0].view(dtype)
    converted[...] = chunk
    return converted


def _rows(item: Found) -> int:
    shape = item.tensor.shape
    return shape[0] if len(shape) > 1 else 1


def _row_bytes(item: Found) -> int:
    shape = item.tensor.shape
    return shape[-1] * DTYPES[item.tensor.dtype].itemsize


def _whole_blocks(item: Found, rows: int, block: tuple[int, int] | None) -> int:
    return rows if item.scale is None or block is None else -(-rows // block[0]) * block[0]
