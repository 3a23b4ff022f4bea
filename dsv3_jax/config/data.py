"""Which text a run learns from: sources, tokenizer, packing."""

import dataclasses
from typing import Literal

from dsv3_jax.config.check import check, check_finite


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Everything the data folder reads.

    Sources. `paths`: files, folders or globs of text (.txt, .md, source code: a document a file), .jsonl (a line),
    .json (a record) and .parquet (a row), the text of the last three in `text_field`; all but .parquet also as .gz
    and .zst; empty: the standard library's own sources.
    `on_bad_file`: "skip" leaves out and counts what cannot be read, "error" stops at it.
    `heldout_fraction`: share of the documents held out for evaluation, chosen by the hash of their content.

    Tokenizer. `tokenizer`: a tokenizer.json (or its folder); None trains a byte-level BPE with as many entries as
    `ModelConfig.vocab_size` on at most `tokenizer_sample_bytes` of the training documents.

    Order. `fim_rate`: share of documents rearranged for fill-in-the-middle (report section 4.1: 0.1).
    `token_split_rate`: share of the tokens joining a mark with a line break that are split in two (same section,
    which does not state the share).
    `document_mask`: False lets attention cross the documents of a row (the report's pre-training); True keeps them
    apart by segment ids (its fine-tuning). Labels never cross.
    `streams`: independent readers that the rows of a batch come from; every process makes the rows of an equal part of
    them, so their number is a multiple of that of the processes.

    Reading. `cache_dir`: folder of the tokenised shards, to share them between runs; None: `RUN_DIR/data`.
    `prefetch_batches`: batches made ahead by a thread; 0 = off.
    `heldout_overlap`: share of an evaluation window that repeats its predecessor as context only.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"
    on_bad_file: Literal["error", "skip"] = "error"
    heldout_fraction: float = 0.05
    tokenizer: str | None = None
    tokenizer_sample_bytes: int = 100_000_000
    fim_rate: float = 0.1
    token_split_rate: float = 0.1
    document_mask: bool = False
    streams: int = 64
    cache_dir: str | None = None
    prefetch_batches: int = 8
    heldout_overlap: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self)
        check(
            isinstance(self.paths, tuple) and all(isinstance(path, str) and path.strip() for path in self.paths),
            f"paths={self.paths!r} must be a tuple of non-empty strings; write paths=('folder',) (DataConfig.paths).",
        )
        check(
            self.text_field.strip() != "",
            f"text_field={self.text_field!r} names no field; give the jsonl field or parquet column with the text "
            "(DataConfig.text_field).",
        )
        check(
            self.on_bad_file in ("error", "skip"),
            f"on_bad_file={self.on_bad_file!r} is unknown; use 'error' or 'skip' (DataConfig.on_bad_file).",
        )
        check(
            0.0 < self.heldout_fraction < 1.0,
            f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1, both excluded (DataConfig).",
        )
        for name in ("fim_rate", "token_split_rate"):
            check(
                0.0 <= getattr(self, name) <= 1.0,
                f"{name}={getattr(self, name)} is not a share; use 0.0 (off) to 1.0 (DataConfig.{name}).",
            )
        check(
            0.0 <= self.heldout_overlap < 1.0,
            f"heldout_overlap={self.heldout_overlap} must lie in 0 <= x < 1; 0.5 is half a window (DataConfig).",
        )
        check(
            self.tokenizer_sample_bytes >= 1,
            f"tokenizer_sample_bytes={self.tokenizer_sample_bytes} must be at least 1 (DataConfig).",
        )
        check(
            self.prefetch_batches >= 0,
            f"prefetch_batches={self.prefetch_batches} is negative; use 0 for none (DataConfig.prefetch_batches).",
        )
        check(self.streams >= 1, f"streams={self.streams} must be at least 1; 64 serve (DataConfig.streams).")
        for name in ("tokenizer", "cache_dir"):
            value = getattr(self, name)
            check(value is None or value.strip() != "", f"{name}={value!r} is empty; use None or a path (DataConfig).")
