"""Prepares the data of a run: splits the corpus, trains the tokenizer, writes the shards.

`python -m dsv3_jax.data.build_folder --config configs/tiny.py --run-dir DIR` does it ahead of training.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tokenizers

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import shown, user_path
from dsv3_jax.data import corpus, shards, split
from dsv3_jax.data import tokenizer as tokenizer_module
from dsv3_jax.data.folder import (
    FORMAT,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    PreparedData,
    content_fingerprint,
    file_sha256,
    open_prepared,
    scan,
    settings,
    source_change,
    stat_fingerprint,
)
from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.interrupt import run_program
from dsv3_jax.progress import progress

_PARTS = frozenset({TOKENIZER_NAME, MANIFEST_NAME, "train", "heldout"})
_CHUNK_CHARS = 2**20
_DECODED_DOCUMENTS = 64


def prepare(
    cfg: DataConfig,
    model: ModelConfig,
    run_dir: str | Path,
    *,
    expected: Mapping[str, str] | None = None,
    log: Callable[[str], None] = print,
) -> PreparedData:
    """Opens the data of a run, making it first where it does not exist yet.

    It lies in `cfg.cache_dir` or `run_dir/data`, is written aside and moved there whole, and then belongs to the run:
    a resumed run reads the same batches even if the sources have changed since (this is said). `run_dir` also gets
    the tokenizer. Several processes may call it at once; the first one works. It may be called in any thread, and
    given up at any moment: what an unfinished one leaves is removed by the next.

    Args:
        expected: what `PreparedData.digest` must say, of a run that has learned from it.
        log: takes lines of progress; by default they are printed.

    Raises:
        UserError: unreadable sources, nothing on one side of the split, a tokenizer that does not fit the model or
            loses text, data prepared with other settings, not the `expected` data, altered files, a disk that refuses.
    """
    run_dir = user_path(run_dir)
    folder = Path(os.path.realpath(user_path(cfg.cache_dir) if cfg.cache_dir else run_dir / "data"))
    try:
        is_made = not (folder / MANIFEST_NAME).exists() and _make(cfg, model, folder, log)
        data = open_prepared(cfg, model, folder)
        if not is_made and (change := source_change(cfg, data)):
            log(
                f"data: the sources {change}; the run goes on with {shown(folder)} (to learn from them as they are "
                f"now, use another {'data.cache_dir and ' if cfg.cache_dir else ''}--run-dir)"
            )
        _check_expected(data, expected or {})
        _copy_tokenizer(folder, run_dir)
    except OSError as e:
        raise UserError(
            f"the data cannot be written to {shown(folder)} ({e}); free space or choose data.cache_dir."
        ) from e
    return data


def main(arguments: list[str] | None = None) -> int:
    """Runs `prepare` from the command line; 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.data.build_folder", description=__doc__)
    add_config_arguments(parser, "--config")
    parser.add_argument("--run-dir", required=True, help="folder of the run; the data goes to its data/")
    given = parser.parse_args(arguments)
    try:
        cfg = load_config(given.config, given.set)
        prepare(cfg.data, cfg.model, given.run_dir, log=print)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _make(cfg: DataConfig, model: ModelConfig, folder: Path, log: Callable[[str], None]) -> bool:
    """Prepares the data unless another process has done so in the meantime; whether it did."""
    with _locked(folder, log):
        if (folder / MANIFEST_NAME).exists():
            return False
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{shown(folder)} holds something else than prepared data; choose another folder (data.cache_dir)."
            )
        _build(cfg, model, folder, log)
        return True


def _build(cfg: DataConfig, model: ModelConfig, folder: Path, log: Callable[[str], None]) -> None:
    started = time.monotonic()
    listing = corpus.list_files(cfg)
    tally = corpus.Tally()
    with progress("reading", None) as advance:
        hashes, num_bytes = scan(cfg, listing, tally, advance)
    if not len(hashes):
        left_out = "; ".join(tally.rejected[:3]) or f"{tally.num_empty} empty documents"
        where = ", ".join(shown(path) for path in cfg.paths) or listing.root
        raise UserError(f"no text in {where} ({left_out}); give other data.paths.")
    rule = split.plan(hashes, cfg.heldout_fraction)
    _log_tally(listing, tally, log)

    partial = folder.with_name(f".{folder.name}.partial")
    _remove_unfinished(partial)
    try:
        partial.mkdir(parents=True)
        tokenizer = _make_tokenizer(cfg, model, listing, rule, num_bytes, log)
        (partial / TOKENIZER_NAME).write_text(tokenizer.to_json(), encoding="utf-8")
        counts = _write_shards(cfg, listing, rule, tokenizer, partial, num_bytes)
        manifest = {
            "format": FORMAT,
            "settings": settings(cfg, model),
            "sources": {
                "listing": stat_fingerprint(listing),
                "content": content_fingerprint(hashes),
                "bytes": num_bytes,
            },
            "counts": counts,
            "tokenizer": file_sha256(partial / TOKENIZER_NAME),
            "left_out": {
                **{why: names.count for why, names in listing.left_out.items()},
                "empty": tally.num_empty,
                "rejected": tally.rejected,
            },
            "split": dataclasses.asdict(rule),
            "tokenizers": tokenizers.__version__,
        }
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    train, held = counts["train"], counts["heldout"]
    log(
        f"data: {train['documents']} documents, {train['bytes'] / 1e6:.2f} MB, {train['tokens']} tokens to learn from; "
        f"{held['documents']} documents, {held['bytes'] / 1e6:.2f} MB held out; "
        f"{train['bytes'] / train['tokens']:.2f} bytes a token; ready in {time.monotonic() - started:.1f} s"
    )


def _write_shards(
    cfg: DataConfig,
    listing: corpus.Listing,
    rule: split.Split,
    tokenizer: TextTokenizer,
    folder: Path,
    num_bytes: int,
) -> dict[str, dict[str, int]]:
    dtype = "uint16" if tokenizer.num_tokens <= 2**16 else "uint32"
    counts = {}
    with progress("writing tokens", num_bytes) as advance:
        for side, name in enumerate(("train", "heldout")):
            counts[name] = {"documents": 0, "tokens": 0, "bytes": 0}
            texts = _texts(cfg, listing, rule, side)
            shards.write(folder / name, _encoded(tokenizer, texts, counts[name], advance), dtype=dtype)
            if not counts[name]["documents"]:
                raise UserError(f"the corpus of {num_bytes} bytes is too small to be split; give more (data.paths).")
    if counts["train"]["bytes"] + counts["heldout"]["bytes"] != num_bytes:
        raise UserError("the sources changed while they were read; leave them alone and start again.")
    return counts


def _make_tokenizer(
    cfg: DataConfig,
    model: ModelConfig,
    listing: corpus.Listing,
    rule: split.Split,
    num_bytes: int,
    log: Callable[[str], None],
) -> TextTokenizer:
    if cfg.tokenizer is not None:
        made = tokenizer_module.load(cfg.tokenizer, bos_id=model.bos_id, eos_id=model.eos_id)
    else:
        if (model.bos_id, model.eos_id) != (0, 1):
            raise UserError(
                f"bos_id={model.bos_id}, eos_id={model.eos_id}, but a tokenizer trained here has 0 and 1; "
                "set model.bos_id=0 and model.eos_id=1, or give data.tokenizer."
            )
        share = min(1.0, cfg.tokenizer_sample_bytes / num_bytes)
        sample = int(share * num_bytes)
        log(f"data: learning {model.vocab_size} tokens from {sample / 1e6:.1f} MB of text")
        # The low half of the hash: the high half decides what is held out.
        texts = (t for t in _texts(cfg, listing, rule, 0) if (split.content_hash(t) & 0xFFFFFFFF) < share * 2**32)
        with progress("learning tokens", None) as advance:
            made = tokenizer_module.train(_counted(texts, advance), vocab_size=model.vocab_size)
    if made.num_tokens > model.vocab_size:
        raise UserError(
            f"the tokenizer {cfg.tokenizer} has {made.num_tokens} tokens, more than vocab_size={model.vocab_size}; "
            f"set model.vocab_size={made.num_tokens} or more."
        )
    if cfg.fim_rate > 0 and made.fim is None:
        raise UserError(
            f"the tokenizer {cfg.tokenizer} lacks {', '.join(tokenizer_module.FIM_MARKS)}; "
            "add them as special tokens or set data.fim_rate=0."
        )
    return made


def _texts(cfg: DataConfig, listing: corpus.Listing, rule: split.Split, side: int) -> Iterator[str]:
    for document in corpus.read(cfg, listing, corpus.Tally()):
        part = rule.parts(document.text)[side]
        if part:
            yield part


def _counted(texts: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text.encode()))


def _encoded(
    tokenizer: TextTokenizer, texts: Iterator[str], count: dict[str, int], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for chunk in _chunks(texts):
        for text, ids in zip(chunk, tokenizer.encode_many(chunk), strict=True):
            size = len(text.encode())
            is_exact = int(tokenizer.bytes_per_token[ids].sum()) == size
            if not is_exact and 0 in (sizes := tokenizer.bytes_per_token[ids]):
                raise UserError(
                    f"the tokenizer writes text with token {ids[sizes == 0][0]}, which is bos, eos or another mark; "
                    "give another data.tokenizer, or other ids as model.bos_id and model.eos_id."
                )
            if not is_exact or (count["documents"] < _DECODED_DOCUMENTS and tokenizer.decode(ids) != text):
                raise UserError(
                    "the tokenizer does not give back the text it was given (a normalizer, an unknown token or no "
                    "byte-level BPE), so bits per byte would mean nothing; give another data.tokenizer."
                )
            count["documents"] += 1
            count["tokens"] += len(ids)
            count["bytes"] += size
            yield ids
        advance(sum(len(text.encode()) for text in chunk))


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _log_tally(listing: corpus.Listing, tally: corpus.Tally, log: Callable[[str], None]) -> None:
    for why, names in listing.left_out.items():
        more = ", …" if names.count > len(names.examples) else ""
        log(f"data: left out: {names.count:,} {why}: {', '.join(names.examples)}{more}")
    if tally.num_empty and listing.root is None:
        log(f"data: left out: {tally.num_empty:,} empty documents")
    for message in tally.rejected[:10]:
        log(f"data: left out: {message}")
    if tally.num_rejected > 10:
        log(f"data: left out: {tally.num_rejected - 10:,} more files, lines or rows")


def _check_expected(data: PreparedData, expected: Mapping[str, str]) -> None:
    digest = data.digest()
    changed = [part for part, value in digest.items() if part in expected and expected[part] != value]
    if changed:
        raise UserError(
            f"{shown(data.folder)} is not the data that this run has learned from ({', '.join(changed)} differ): bring "
            f"it or the sources back as they were (and then delete {shown(data.folder)}), or use another --run-dir."
        )


def _copy_tokenizer(folder: Path, run_dir: Path) -> None:
    source, target = folder / TOKENIZER_NAME, run_dir / TOKENIZER_NAME
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{TOKENIZER_NAME}.{threading.get_native_id()}")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _remove_unfinished(partial: Path) -> None:
    """Removes what a preparation that was killed left behind, and nothing else."""
    if not os.path.lexists(partial):
        return
    if not partial.is_dir() or partial.is_symlink() or {child.name for child in partial.iterdir()} - _PARTS:
        raise UserError(f"{shown(partial)} is not what an unfinished preparation leaves behind; move it elsewhere.")
    shutil.rmtree(partial)


@contextlib.contextmanager
def _locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Lets one process in at a time; the lock goes with the process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"data: waiting for another process that prepares {shown(folder)}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    run_program(main)
