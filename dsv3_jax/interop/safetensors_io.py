"""The safetensors format, one tensor at a time in both directions.

A file is: length of the header (8 bytes, little endian), a JSON header of names, dtypes, shapes and offsets, the data.
Reading takes one tensor from the disk; writing places each tensor where the header says, so neither holds a file.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.config.check import UserError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The stored types that are read; all but F16 are also written."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


class CheckpointError(UserError):
    """A checkpoint that is missing, broken, or not what its configuration says."""


class StoredTensor(NamedTuple):
    """Where a tensor lies: bytes `start`..`stop` of `file`. `dtype` is the format's own name, such as "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        """Reads this tensor alone.

        Raises: `CheckpointError` for a type outside `DTYPES`, or when the file has shrunk.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has dtype {self.dtype}, which is not read; "
                f"convert it to one of {', '.join(DTYPES)}."
            )
        count = self.stop - self.start
        raw = np.fromfile(self.file, np.uint8, count, offset=self.start)
        if raw.size != count:
            raise CheckpointError(
                f"{self.file}: ends inside tensor {self.name!r} ({raw.size} of {count} bytes); fetch the file again."
            )
        return raw.view(DTYPES[self.dtype]).reshape(self.shape)


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from headers alone; checks each file's length.

    Raises: `CheckpointError` naming the file for a missing or truncated shard, a broken index, or a tensor that is
    not in the shard that the index names.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: has neither {INDEX} nor {SINGLE}; give a folder of safetensors weights.")
        return read_header(folder / SINGLE)
    weight_map = _read_index(folder / INDEX)
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, []).append(tensor)
    found: dict[str, StoredTensor] = {}
    for name, tensors in sorted(files.items()):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: shard is missing; {INDEX} places {len(tensors)} tensors in it, such as "
                f"{tensors[0]!r}. Fetch the file again."
            )
        header = read_header(folder / name)
        for tensor in tensors:
            if tensor not in header:
                raise CheckpointError(
                    f"{folder / name}: tensor {tensor!r} is not in this shard, where {INDEX} places it; "
                    "index and shards are from different checkpoints, fetch them together."
                )
        for tensor in header:
            if tensor not in weight_map:
                raise CheckpointError(
                    f"{folder / name}: holds tensor {tensor!r}, which {INDEX} does not list; "
                    "index and shards are from different checkpoints, fetch them together."
                )
        found.update((tensor, header[tensor]) for tensor in tensors)
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises: `CheckpointError` when the file is not safetensors or is shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: is truncated or not safetensors: {size} bytes, but its header alone claims {length}; "
                "fetch the file again."
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = {
            name: StoredTensor(
                name,
                file,
                value["dtype"],
                tuple(int(n) for n in value["shape"]),
                8 + length + int(value["data_offsets"][0]),
                8 + length + int(value["data_offsets"][1]),
            )
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: its safetensors header cannot be read ({error}); fetch it again.") from error
    end = max((tensor.stop for tensor in tensors.values()), default=8 + length)
    if size != end:
        raise CheckpointError(
            f"{file}: has {size} bytes, but its header places tensors up to byte {end}; "
            "the file is truncated or damaged, fetch it again."
        )
    for tensor in tensors.values():
        dtype = DTYPES.get(tensor.dtype)
        expected = tensor.stop - tensor.start if dtype is None else math.prod(tensor.shape) * dtype.itemsize
        if tensor.stop - tensor.start != expected or tensor.start < 8 + length:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} of shape {tensor.shape} and dtype {tensor.dtype} needs {expected} "
                f"bytes, but its offsets span {tensor.stop - tensor.start}; the file is damaged, fetch it again."
            )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The free text that the writer put into the header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__", {})


def write_file(
    file: Path,
    contents: Iterable[tuple[str, tuple[int, ...], str]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """Writes `tensors`, in any order, into a new file for the (name, shape, dtype) of `contents`; then fsyncs it.

    Tensors lie by falling item size, then name, so that each is aligned. One tensor is in memory at a time.
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
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            place, shape, dtype = start.pop(name)
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise ValueError(f"{name}: got {array.dtype} {array.shape}, the header says {dtype} {shape}.")
            stream.seek(8 + len(text) + place)
            stream.write(np.ascontiguousarray(array).view(np.uint8).data)
        if start:
            raise ValueError(f"{file}: no data came for {sorted(start)[0]!r}.")
        stream.flush()
        os.fsync(stream.fileno())


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read as an index ({error!r}); fetch it again.") from error
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{file}: places tensor {tensor!r} in {name!r}, which is not a file of this folder.")
    return weight_map
