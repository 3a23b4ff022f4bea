"""The safetensors format, one tensor at a time in both directions.

A file is: length of the header (8 bytes, little endian), a JSON header of names, dtypes, shapes and offsets, the data.
Reading takes one tensor from the disk; writing places each tensor where the header says, so neither holds a file.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.interop.json_file import MAX_BYTES, CheckpointError, open_file, parse_json, read_json, shorten
from dsv3_jax.interop.strips import Strips, ahead

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The stored types that are read; all but F16 and F8_E8M0 are also written."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SYNC_BYTES = 2**28
"""What may wait for the disk: little enough for `advance` to be told what is written, not what is promised."""

_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of an element of each type that the format has."""


class StoredTensor(NamedTuple):
    """Where a tensor lies: bytes `start`..`stop` of `file`. `dtype` is the format's own name, such as "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads this tensor alone, or its rows `start` to `stop` alone.

        Raises: `CheckpointError` for a type outside `DTYPES`, or when the file has shrunk or cannot be read.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which is not read; "
                f"convert it to one of {', '.join(DTYPES)}."
            )
        shape, offset, count = self.shape, self.start, self.stop - self.start
        if stop is not None:
            row_bytes = count // max(1, shape[0])
            shape, offset, count = (stop - start, *shape[1:]), offset + start * row_bytes, (stop - start) * row_bytes
        raw = np.empty(count, np.uint8)
        with open_file(self.file) as stream:
            try:
                stream.seek(offset)
                done = stream.readinto(raw)
            except OSError as error:
                raise CheckpointError(
                    f"{self.file}: tensor {self.name!r} cannot be read ({error.strerror}); fetch the file again."
                ) from error
        if done != count:
            raise CheckpointError(
                f"{self.file}: ends inside tensor {self.name!r} ({done} of {count} bytes); fetch the file again."
            )
        return raw.view(DTYPES[self.dtype]).reshape(shape)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from headers alone; checks each file's length.

    Raises: `CheckpointError` naming the file for a missing or truncated shard, a broken index, or a tensor that is
    not in the shard that the index names.
    """
    if not os.path.lexists(folder / INDEX):
        if not os.path.lexists(folder / SINGLE):
            raise CheckpointError(f"{folder}: has neither {INDEX} nor {SINGLE}; give a folder of safetensors weights.")
        return read_header(folder / SINGLE)
    weight_map = _read_index(folder / INDEX)
    if os.path.lexists(folder / SINGLE) and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{folder}: has {SINGLE} and {INDEX}, which does not list it: two checkpoints, of which programs read "
            "one or the other; move one of them away."
        )
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, []).append(tensor)
    found: dict[str, StoredTensor] = {}
    for name, tensors in sorted(files.items()):
        if not os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder / name}: shard is missing; {INDEX} places {len(tensors)} tensors in it, such as "
                f"{shorten(tensors[0])!r}. Fetch the file again."
            )
        header = read_header(folder / name)
        for tensor in tensors:
            if tensor not in header:
                raise CheckpointError(
                    f"{folder / name}: tensor {shorten(tensor)!r} is not in this shard, where {INDEX} places it; "
                    "index and shards are from different checkpoints, fetch them together."
                )
        for tensor in header:
            if weight_map.get(tensor) != name:
                place = f"places in {weight_map[tensor]}" if tensor in weight_map else "does not list"
                raise CheckpointError(
                    f"{folder / name}: holds tensor {shorten(tensor)!r}, which {INDEX} {place}; "
                    "index and shards are from different checkpoints, fetch them together."
                )
        found.update((tensor, header[tensor]) for tensor in tensors)
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, which must cover its data from the first byte to the last, without overlap.

    Raises: `CheckpointError` when the file is not safetensors, its header contradicts itself, or it is shorter or
        longer than its header says.
    """
    header, begin = _read_json_header(file)
    tensors = [_stored(file, name, value, begin) for name, value in header.items() if name != "__metadata__"]
    end, before = begin, None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end:
            problem = "overlaps" if tensor.start < end else "leaves a hole after"
            what = "the header" if before is None else f"tensor {before.name!r}"
            raise CheckpointError(
                f"{file}: tensor {shorten(tensor.name)!r} {problem} {what}; its data must begin where that ends; "
                "the file is damaged, fetch it again."
            )
        end, before = tensor.stop, tensor
    size = file.stat().st_size
    if size != end:
        raise CheckpointError(
            f"{file}: has {size} bytes, but its header places tensors up to byte {end}; "
            "the file is truncated or damaged, fetch it again."
        )
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(file: Path) -> dict[str, str]:
    """The free text that the writer put into the header. Raises: as `read_header` for a header that is not read."""
    header, _ = _read_json_header(file)
    return header.get("__metadata__") or {}


def write_file(
    file: Path,
    contents: Iterable[tuple[str, tuple[int, ...], str]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes `tensors`, in any order, into a new file for the (name, shape, dtype) of `contents`; then fsyncs it.

    Tensors lie by falling item size, then name, so that each is aligned. Two tensors are in memory at a time: one is
    made while one is written. `advance` is told the bytes of each piece that was written; what it raises ends the call.
    Raises: ValueError when tensors and contents differ; OSError from the disk.
    """
    ordered = sorted(contents, key=lambda item: (-np.dtype(item[2]).itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": metadata}
    offset, start = 0, {}
    for name, shape, dtype in ordered:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        start[name] = (offset, shape, dtype)
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        strips = Strips()
        for name, array in tensors:
            place, shape, dtype = start.pop(name)
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise ValueError(f"{name}: got {array.dtype} {array.shape}, the header says {dtype} {shape}.")
            place += 8 + len(text)
            for piece in strips.of(array):
                yield place, piece
                place += piece.nbytes

    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        unsynced = 0
        for place, piece in ahead(pieces()):
            stream.seek(place)
            stream.write(piece.data)
            unsynced += piece.nbytes
            if unsynced >= _SYNC_BYTES:
                stream.flush()
                os.fsync(stream.fileno())
                unsynced = 0
            advance(piece.nbytes)
        if start:
            raise ValueError(f"{file}: no data came for {sorted(start)[0]!r}.")
        stream.flush()
        os.fsync(stream.fileno())


def _read_json_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header, where the data begin)."""
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: is truncated or not safetensors: {size} bytes, but its header alone claims {length}; "
                "fetch the file again."
            )
        if length > MAX_BYTES:
            raise CheckpointError(
                f"{file}: is not safetensors: its header claims {length:,} bytes, but the format allows {MAX_BYTES:,}; "
                "fetch the file again."
            )
        text = stream.read(length)
    header = parse_json(text, name=f"{file}: its safetensors header")
    metadata = header.get("__metadata__")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(
            f"{file}: __metadata__ of its safetensors header must be an object of strings; "
            "write the file again with the safetensors library."
        )
    return header, 8 + length


def _stored(file: Path, name: str, value: Any, begin: int) -> StoredTensor:
    """One entry of a header, checked on its own."""
    given = value if isinstance(value, dict) else {}
    dtype, shape, offsets = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    is_whole = isinstance(dtype, str) and _are_whole(shape) and _are_whole(offsets)
    if not is_whole or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{file}: tensor {shorten(name)!r} is described by {shorten(repr(value))}, but needs a dtype, a shape of "
            "whole numbers and two data_offsets; the file is damaged, fetch it again."
        )
    if dtype not in _BITS:
        raise CheckpointError(
            f"{file}: tensor {shorten(name)!r} has dtype {shorten(str(dtype))!r}, which the safetensors format does "
            f"not have; write it as one of {', '.join(DTYPES)}."
        )
    start, stop = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (stop - start):
        raise CheckpointError(
            f"{file}: tensor {shorten(name)!r} of shape {shorten(str(tuple(shape)))} and dtype {dtype} needs "
            f"{-(-bits // 8)} bytes, but its offsets span {stop - start}; the file is damaged, fetch it again."
        )
    return StoredTensor(name, file, dtype, tuple(shape), begin + start, begin + stop)


def _are_whole(values: Any) -> bool:
    """Whether it is a list of whole numbers that fit 64 bits."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _read_index(file: Path) -> dict[str, str]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{file}: cannot be read as an index: weight_map must be an object of tensor names and file names, "
            f"not {shorten(repr(weight_map))}; fetch it again."
        )
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and Path(name).name == name != "" and name != ".." and name.isprintable()):
            raise CheckpointError(
                f"{file}: places tensor {shorten(tensor)!r} in {shorten(repr(name))}, which is not the name of a file "
                "of this folder; fetch it again."
            )
    return weight_map
