"""The data of a run as it lies on disk: manifest, tokenizer, shards."""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.data import corpus, shards, split
from dsv3_jax.data import tokenizer as tokenizer_module
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.tokenizer import TextTokenizer

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT = 1
_RECHECKED_SIZE = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
    """Tokenised documents of a run, without bos and eos. `counts[split]` has documents, tokens and (UTF-8) bytes."""

    folder: Path
    tokenizer: TextTokenizer
    train: Shards
    heldout: Shards
    counts: dict[str, dict[str, int]]

    def heldout_texts(self) -> Sequence[bytes]:
        """The held-out documents, byte for byte, decoded when they are asked for."""
        return _Texts(self.tokenizer, self.heldout)

    def digest(self) -> dict[str, str]:
        """SHA-256 of "tokenizer", "train" and "heldout": equal exactly where ids and tokens are; no shard is read."""
        return {
            "tokenizer": file_sha256(self.folder / TOKENIZER_NAME),
            "train": self.train.digest(),
            "heldout": self.heldout.digest(),
        }


class _Texts(Sequence[bytes]):
    def __init__(self, tokenizer: TextTokenizer, documents: Shards):
        self._tokenizer, self._documents = tokenizer, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return self._tokenizer.decode(self._documents[index]).encode()


def open_prepared(cfg: DataConfig, model: ModelConfig, folder: Path) -> PreparedData:
    """Opens what `prepare` made.

    Raises:
        UserError: it is damaged, of another version, or was made with other settings (the differences are named).
    """
    remedy = f"use another --run-dir, or delete {folder} to prepare the data again"
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder} was prepared by another version (format {manifest['format']}); {remedy}.")
        old, new, counts = manifest["settings"], settings(cfg, model), manifest["counts"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / MANIFEST_NAME} is damaged ({e!r}); {remedy}.") from e
    changed = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(f"{folder} was prepared with other settings ({'; '.join(changed)}); {remedy}.")
    tokenizer = tokenizer_module.load(folder / TOKENIZER_NAME, bos_id=model.bos_id, eos_id=model.eos_id)
    train, heldout = (shards.open_shards(folder / name) for name in ("train", "heldout"))
    return PreparedData(folder, tokenizer, train, heldout, counts)


def source_change(cfg: DataConfig, folder: Path) -> str | None:
    """What happened to the sources since they were prepared, None if nothing did; large ones are not read again."""
    old = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["sources"]
    try:
        listing = corpus.list_files(cfg)
        if stat_fingerprint(listing) == old["listing"]:
            return None
        if old["bytes"] <= _RECHECKED_SIZE:
            hashes, _ = scan(cfg, listing, corpus.Tally())
            if content_fingerprint(hashes) == old["content"]:
                return None
        return "have changed since the data was prepared"
    except (UserError, OSError) as e:
        return f"cannot be read now ({e})"


def scan(cfg: DataConfig, listing: corpus.Listing, tally: corpus.Tally) -> tuple[UInt64[np.ndarray, "N"], int]:
    """Reads the corpus once: the content hash of each document, and the UTF-8 bytes of all."""
    hashes = array("Q")
    num_bytes = 0
    for document in corpus.read(cfg, listing, tally):
        hashes.append(split.content_hash(document.text))
        num_bytes += len(document.text.encode())
    return np.array(hashes, np.uint64), num_bytes


def file_sha256(file: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_fingerprint(hashes: UInt64[np.ndarray, "N"]) -> str:
    """A hash of all documents in their order."""
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def stat_fingerprint(listing: corpus.Listing) -> str:
    """A hash of names, sizes and times: cheap, and equal only if nothing was touched."""
    digest = hashlib.sha256()
    for file in listing.files:
        stat = file.stat()
        digest.update(f"{listing.name(file)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def settings(cfg: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """The settings that decide what the prepared data holds; a given tokenizer counts by its content."""
    given = user_path(cfg.tokenizer) if cfg.tokenizer else None
    if given is not None and given.is_dir():
        given = given / TOKENIZER_NAME
    chosen = hashlib.sha256(given.read_bytes()).hexdigest() if given and given.is_file() else cfg.tokenizer
    return {
        "data.paths": list(cfg.paths),
        "data.text_field": cfg.text_field,
        "data.on_bad_file": cfg.on_bad_file,
        "data.heldout_fraction": cfg.heldout_fraction,
        "data.tokenizer": chosen,
        "data.tokenizer_sample_bytes": cfg.tokenizer_sample_bytes,
        "model.vocab_size": model.vocab_size,
        "model.bos_id": model.bos_id,
        "model.eos_id": model.eos_id,
    }
