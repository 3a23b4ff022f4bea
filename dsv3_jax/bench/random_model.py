"""A folder of random weights to serve, for our server or for a peer's."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.config.run import RunConfig
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.model.params import init
from dsv3_jax.typing import Variables


def random_variables(cfg: RunConfig) -> Variables:
    """The parameters that `export` writes, in float32."""
    return init(cfg.model, jax.random.key(cfg.seed), dtype=jnp.float32)


def export(cfg: RunConfig, folder: Path) -> Path:
    """Writes random weights in float32, without a tokenizer; returns the folder."""
    save_pretrained(folder, cfg.model, random_variables(cfg), dtype="float32", with_mtp=False)
    return folder


def export_for_peers(model: Path, folder: Path, *, vocab_size: int) -> Path:
    """`model` with what transformers' server needs besides: a tokenizer whose text for token 5 is w5, and no eos.

    Weights are linked, not copied.
    """
    folder.mkdir(parents=True)
    for file in model.iterdir():
        os.link(file, folder / file.name)
    vocab = {f"w{token}": token for token in range(vocab_size)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
        "generation_config.json": {"do_sample": False, "eos_token_id": None, "pad_token_id": 0},
    }
    for name, content in files.items():
        path = folder / name
        path.unlink(missing_ok=True)  # a link's file is shared
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder
