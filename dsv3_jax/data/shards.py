"""Shards: arrays of varying length kept in a few plain .npy files, read through memory maps."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt64

from dsv3_jax.config.check import UserError

INDEX_NAME = "index.json"
_FORMAT = 1
_HASHED_AT_OPEN_SIZE = 2**28


def write(
    folder: Path, records: Iterable[Integer[np.ndarray, "_"]], *, dtype: str, max_shard_items: int = 2**27
) -> "Shards":
    """Writes integer records into `folder` (made anew) as `dtype`, a new file when one holds `max_shard_items`.

    The index is written last: a folder without it is not a set of shards.
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
    remedy = "delete the folder to prepare the data again"
    try:
        index = json.loads((folder / INDEX_NAME).read_text())
        if index["format"] != _FORMAT:
            raise UserError(f"{folder} has shard format {index['format']}, this version reads {_FORMAT}; {remedy}.")
        files, offsets = [], []
        for entry in index["shards"]:
            files.append(np.load(folder / entry["items"], mmap_mode="r", allow_pickle=False))
            offsets.append(np.load(folder / entry["offsets"], allow_pickle=False))
            if files[-1].shape != (entry["num_items"],) or offsets[-1].shape != (entry["num_records"] + 1,):
                raise UserError(f"{folder / entry['items']} has not the size its index says; {remedy}.")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} does not hold readable shards ({e}); {remedy}.") from e
    starts = np.cumsum([0, *(len(one) - 1 for one in offsets)])
    shards = Shards(folder, tuple(files), tuple(offsets), starts, tuple(entry["sha256"] for entry in index["shards"]))
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

    def digest(self) -> str:
        """SHA-256 of all records, made from the hashes of the files, which are not read."""
        dtype = self.files[0].dtype.str if self.files else ""
        return hashlib.sha256("\n".join([dtype, *self.sha256]).encode()).hexdigest()

    def verify(self) -> None:
        """Raises UserError unless every file still has the hash it was written with."""
        for found, offsets, expected in zip(self.files, self.offsets, self.sha256, strict=True):
            if _sha256(found, offsets) != expected:
                raise UserError(
                    f"a shard in {self.folder} was altered after it was written (its hash differs); "
                    "delete the folder to prepare the data again."
                )


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
