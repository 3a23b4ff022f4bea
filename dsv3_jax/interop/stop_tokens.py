"""The tokens that end generation, as an official folder declares them."""

import os
from pathlib import Path

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.fields import token_ids
from dsv3_jax.interop.json_file import read_json


def stop_ids(folder: str | Path, cfg: ModelConfig) -> tuple[int, ...]:
    """`cfg.eos_id`, then the other `eos_token_id`s of config.json and generation_config.json, each once.

    A chat model names in the second file where its turns end. Either file may be absent, or name one id, several or
    none. For `generate(eos_id=)`.

    Raises: `CheckpointError` for a file that is no JSON object, `ConfigError` for what is no id of the vocabulary.
    """
    found = [] if cfg.eos_id is None else [cfg.eos_id]
    for name in ("config.json", "generation_config.json"):
        file = Path(folder) / name
        if os.path.lexists(file):
            found += token_ids(read_json(file), "eos_token_id", vocab_size=cfg.vocab_size, name=str(file))
    return tuple(dict.fromkeys(found))
