"""The data of a run as it lies on disk: manifest, tokenizer, shards."""

import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.data import corpus, shards, split
from dsv3_jax.data import tokenizer as tokenizer_module
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.stored import read_object, typed
from dsv3_jax.data.tokenizer import TextTokenizer

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT = 1
_RECHECKED_SIZE = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
    """Tokenised documents of a run, without bos and eos.

    `counts[split]` has documents, tokens and (UTF-8) bytes; `sources` the bytes and fingerprints of the corpus.
    """

    folder: Path
    tokenizer: TextTokenizer
    train: Shards
    heldout: Shards
    counts: dict[str, dict[str, int]]
    sources: dict[str, Any]

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
    advice = f"use another --run-dir, or delete {shown(folder)} to prepare the data again"
    try:
        manifest = read_object(folder / MANIFEST_NAME)
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{shown(folder)} was prepared by another version (format {manifest.get('format')!r}); {advice}."
            )
        old, counts, sources = (typed(manifest, key, dict) for key in ("settings", "counts", "sources"))
        for key, kind in (("listing", str), ("content", str), ("bytes", int)):
            typed(sources, key, kind)
        for side in ("train", "heldout"):
            for key in ("documents", "tokens", "bytes"):
                typed(typed(counts, side, dict), key, int)
        chosen = file_sha256(folder / TOKENIZER_NAME)
    except (OSError, ValueError) as e:
        raise UserError(f"{shown(folder / MANIFEST_NAME)} is damaged ({e}); {advice}.") from e
    new = settings(cfg, model)
    changed = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in new if old.get(key) != new[key]]
    if changed:
        raise UserError(f"{shown(folder)} was prepared with other settings ({'; '.join(changed)}); {advice}.")
    if manifest.get("tokenizer", chosen) != chosen:
        raise UserError(f"{shown(folder / TOKENIZER_NAME)} was altered after it was written; {advice}.")
    tokenizer = tokenizer_module.load(folder / TOKENIZER_NAME, bos_id=model.bos_id, eos_id=model.eos_id)
    train, heldout = (shards.open_shards(folder / name) for name in ("train", "heldout"))
    for side, found in (("train", train), ("heldout", heldout)):
        if (counts[side]["documents"], counts[side]["tokens"]) != (len(found), found.num_items):
            raise UserError(f"{shown(found.folder)} has not the documents that {MANIFEST_NAME} says; {advice}.")
    return PreparedData(folder, tokenizer, train, heldout, counts, sources)


def source_change(cfg: DataConfig, data: PreparedData) -> str | None:
    """What happened to the sources since they were prepared, None if nothing did; large ones are not read again."""
    try:
        listing = corpus.list_files(cfg)
        if stat_fingerprint(listing) == data.sources["listing"]:
            return None
        if data.sources["bytes"] <= _RECHECKED_SIZE:
            hashes, _ = scan(cfg, listing, corpus.Tally())
            if content_fingerprint(hashes) == data.sources["content"]:
                return None
        return "have changed since the data was prepared"
    except UserError as e:
        return f"cannot be read now ({e})"


def scan(
    cfg: DataConfig, listing: corpus.Listing, tally: corpus.Tally, advance: Callable[[int], None] = lambda size: None
) -> tuple[UInt64[np.ndarray, "_"], int]:
    """Reads the corpus once: the content hash of each document, and the UTF-8 bytes of all."""
    hashes = array("Q")
    num_bytes = 0
    for document in corpus.read(cfg, listing, tally):
        hashes.append(split.content_hash(document.text))
        size = len(document.text.encode())
        num_bytes += size
        advance(size)
    return np.array(hashes, np.uint64), num_bytes


def file_sha256(file: Path) -> str:
    """SHA-256 of a small file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_fingerprint(hashes: UInt64[np.ndarray, "_"]) -> str:
    """A hash of all documents in their order."""
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def stat_fingerprint(listing: corpus.Listing) -> str:
    """A hash of names, sizes and times: cheap, and equal only if nothing was touched."""
    digest = hashlib.sha256()
    for file in listing.files:
        try:
            stat = file.stat()
            seen = f"{stat.st_size}\0{stat.st_mtime_ns}"
        except OSError as e:
            seen = str(e.strerror)
        digest.update(f"{listing.name(file)}\0{seen}\n".encode())
    return digest.hexdigest()


def settings(cfg: DataConfig, model: ModelConfig) -> dict[str, Any]:
    """The settings that decide what the prepared data holds; a given tokenizer counts by its content."""
    given = user_path(cfg.tokenizer) if cfg.tokenizer else None
    if given is not None and given.is_dir():
        given = given / TOKENIZER_NAME
    try:
        chosen = file_sha256(given) if given and given.is_file() else cfg.tokenizer
    except OSError:  # says nothing here: what reads the tokenizer does
        chosen = cfg.tokenizer
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
