"""The files that let transformers' AutoTokenizer load a `tokenizer.json`."""

import json
from pathlib import Path

from dsv3_jax.config.check import ConfigError, check
from dsv3_jax.config.model import ModelConfig


def tokenizer_files(cfg: ModelConfig, tokenizer: Path) -> dict[str, str]:
    """File name -> text: the tokenizer.json as it is, and a tokenizer_config.json naming its special tokens.

    Raises: `ConfigError` when the file is no tokenizer or has ids that the model has not.
    """
    check(tokenizer.is_file(), f"{tokenizer}: does not exist; give a tokenizer.json.")
    text = tokenizer.read_text(encoding="utf-8")
    try:
        parsed = json.loads(text)
        added = {token["id"]: token["content"] for token in parsed["added_tokens"]}
        vocab = parsed["model"]["vocab"]
        largest = max([*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))), *added])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{tokenizer}: cannot be read as a tokenizer.json ({error!r}); give one written by `tokenizers`."
        ) from error
    check(
        largest < cfg.vocab_size,
        f"{tokenizer}: has token id {largest}, but vocab_size={cfg.vocab_size}; it belongs to another model.",
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_position,
        "clean_up_tokenization_spaces": False,
        "bos_token": added.get(cfg.bos_id),
        "eos_token": added.get(cfg.eos_id),
    }
    return {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n"}
