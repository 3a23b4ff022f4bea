"""Shards: arrays of varying length stored in a few plain .npy files, read through memory maps."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, UInt64

from dsv3_jax.config.check import UserError
from dsv3_jax.config.paths import shown
from dsv3_jax.data.stored import read_object, typed

INDEX_NAME = "index.json"
_FORMAT = 1
_HASHED_AT_OPEN_SIZE = 2**28


def write(
    folder: Path, records: Iterable[Integer[np.ndarray, "_"]], *, dtype: str, max_shard_items: int = 2**27
) -> "Shards":
    """Writes integer records into `folder` as `dtype`, a new file when one holds `max_shard_items`.

    The folder must not exist. The index is written last: a folder without it is not a set of shards.
    """
    folder.mkdir(parents=True)
    pending: list[np.ndarray] = []
    entries: list[dict[str, object]] = []
    num_items = 0
    for record in records:
        pending.append(record.astype(dtype))
        num_items += len(record)
        if num_items >= max_shard_items:
            entries.append(_write_shard(folder, len(entries), pending, dtype))
            pending, num_items = [], 0
    if pending:
        entries.append(_write_shard(folder, len(entries), pending, dtype))
    (folder / INDEX_NAME).write_text(json.dumps({"format": _FORMAT, "dtype": dtype, "shards": entries}, indent=1))
    return open_shards(folder)


def open_shards(folder: Path) -> "Shards":
    """Opens what `write` wrote. Sizes are always checked, hashes up to 256 MiB (`Shards.verify` checks all).

    Raises:
        UserError: the index or a file is missing, truncated or altered.
    """
    advice = "delete the folder to prepare the data again"
    try:
        index = read_object(folder / INDEX_NAME)
        if index.get("format") != _FORMAT:
            raise UserError(
                f"{shown(folder)} has shard format {index.get('format')!r}, this version reads {_FORMAT}; {advice}."
            )
        entries = typed(index, "shards", list)
        opened = [_open_shard(folder, entry, typed(index, "dtype", str)) for entry in entries]
    except (OSError, ValueError) as e:
        raise UserError(f"{shown(folder)} does not hold readable shards ({e}); {advice}.") from e
    files, offsets, hashes = zip(*opened, strict=True) if opened else ((), (), ())
    starts = np.cumsum([0, *(len(one) - 1 for one in offsets)])
    shards = Shards(folder, files, offsets, starts, hashes)
    if sum(one.nbytes for one in files) <= _HASHED_AT_OPEN_SIZE:
        shards.verify()
    return shards


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """Random access to records: `len(shards)`, `shards[i]` (an array; a grain data source)."""

    folder: Path
    files: tuple[np.ndarray, ...]
    offsets: tuple[np.ndarray, ...]
    starts: np.ndarray
    sha256: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} is outside 0..{len(self) - 1} of {self.folder}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        begin, end = self.offsets[shard][index - self.starts[shard] :][:2]
        return np.asarray(self.files[shard][begin:end])

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, records={len(self)})"

    @property
    def num_items(self) -> int:
        """Items of all records together."""
        return sum(len(one) for one in self.files)

    def lengths(self) -> Int[np.ndarray, "N"]:
        """Items of each record."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(one.astype(np.int64)) for one in self.offsets)])

    def digest(self) -> str:
        """SHA-256 of all records, made from the hashes of the files, which are not read."""
        dtype = self.files[0].dtype.str if self.files else ""
        return hashlib.sha256("\n".join([dtype, *self.sha256]).encode()).hexdigest()

    def verify(self) -> None:
        """Raises UserError unless every file still has the hash it was written with."""
        for found, offsets, expected in zip(self.files, self.offsets, self.sha256, strict=True):
            if _sha256(found, offsets) != expected:
                raise UserError(
                    f"a shard in {shown(self.folder)} was altered after it was written (its hash differs); "
                    "delete the folder to prepare the data again."
                )


def _open_shard(folder: Path, entry: object, dtype: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Items, offsets and hash of one shard, checked against its entry in the index; ValueError where they differ."""
    if not isinstance(entry, dict):
        raise ValueError(f"an entry of its index is a {type(entry).__name__}")
    items = _open_array(folder / typed(entry, "items", str), dtype, typed(entry, "num_items", int))
    offsets = _open_array(folder / typed(entry, "offsets", str), "uint64", typed(entry, "num_records", int) + 1)
    if offsets[0] != 0 or offsets[-1] != len(items) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"the offsets in {entry['offsets']} do not divide its items")
    return items, offsets, typed(entry, "sha256", str)


def _open_array(file: Path, dtype: str, length: int) -> np.ndarray:
    if not file.is_file():  # opening a pipe would wait
        raise ValueError(f"{file.name} is missing")
    found = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.dtype.name != dtype or found.shape != (length,):
        raise ValueError(f"{file.name} has not the {length} items of {dtype} that its index says")
    return found


def _write_shard(folder: Path, number: int, records: list[np.ndarray], dtype: str) -> dict[str, object]:
    items = np.concatenate(records).astype(dtype)
    offsets = np.cumsum([0, *(len(record) for record in records)]).astype(np.uint64)
    names = f"{number:05d}.items.npy", f"{number:05d}.offsets.npy"
    np.save(folder / names[0], items, allow_pickle=False)
    np.save(folder / names[1], offsets, allow_pickle=False)
    return {
        "items": names[0],
        "offsets": names[1],
        "num_records": len(records),
        "num_items": len(items),
        "sha256": _sha256(items, offsets),
    }


def _sha256(items: Integer[np.ndarray, "_"], offsets: UInt64[np.ndarray, "_"]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(items))
    digest.update(offsets)
    return digest.hexdigest()
