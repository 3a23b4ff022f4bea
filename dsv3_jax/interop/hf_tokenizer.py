"""The files beside the weights from which other programs know how texts become ids, and when to stop."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from dsv3_jax.config.check import check
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.data import tokenizer as project_tokenizer
from dsv3_jax.interop.json_file import open_file, read_json

GENERATION, SETTINGS, TOKENIZER = "generation_config.json", "tokenizer_config.json", "tokenizer.json"

_COPIED = (
    TOKENIZER,
    SETTINGS,
    GENERATION,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What an official folder may have for its tokenizer, chats and generation."""

_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companion_files(cfg: ModelConfig, source: Path | None) -> dict[str, bytes]:
    """File name -> contents of what goes along with the weights, config.json aside.

    Args:
        source: an official folder, of which all is copied byte for byte; a tokenizer.json, or a folder with nothing but
            that, which is then described as training uses it; None for a model without a tokenizer.
    Returns: always with a generation_config.json; a folder's own, or one of the ids that are known.
    Raises: `UserError` when `source` is missing or damaged, lacks bos or eos, or has ids that the model has not.
    """
    files, ids = {}, {}
    if source is not None and source.is_dir():
        files, ids = _copied(source), declared_ids(cfg, source)
        check(
            bool(files) or (source / "config.json").is_file(),
            f"{source}: has no {TOKENIZER} and is no official folder; give a {TOKENIZER} or such a folder.",
        )
    if source is not None and (TOKENIZER in files or not source.is_dir()):
        file = source / TOKENIZER if source.is_dir() else source
        parsed = read_json(file)
        ours = project_tokenizer.load(file, bos_id=cfg.bos_id, eos_id=cfg.eos_id)
        check(
            ours.num_tokens <= cfg.vocab_size,
            f"{file}: has token id {ours.num_tokens - 1}, but vocab_size={cfg.vocab_size}; "
            "it belongs to another model.",
        )
        if SETTINGS not in files:
            files |= _described(cfg, file, parsed, ours.pad_id)
            ids = {"pad_token_id": ours.pad_id, **ids}
    if GENERATION not in files:
        ids = {"bos_token_id": cfg.bos_id, "eos_token_id": cfg.eos_id, "pad_token_id": cfg.eos_id, **ids}
        files[GENERATION] = _json({key: value for key, value in ids.items() if value is not None})
    return files


def declared_ids(cfg: ModelConfig, folder: Path) -> dict[str, Any]:
    """The ids that an official folder's config.json gives to bos, eos and pad, where they agree with `cfg`.

    `ModelConfig` holds one eos id; a config.json may name several, of which it is the first.
    """
    if not (folder / "config.json").is_file():
        return {}
    config = read_json(folder / "config.json")
    found = {key: config[key] for key in _ID_KEYS if config.get(key) is not None}
    for key, ours in (("bos_token_id", cfg.bos_id), ("eos_token_id", cfg.eos_id)):
        stated = found.get(key)
        if (stated[:1] if isinstance(stated, list) else [stated]) != [ours]:
            found.pop(key, None)
    return found


def _copied(folder: Path) -> dict[str, bytes]:
    """What `folder` has for its tokenizer, chats and generation; with code for its tokenizer, its Python files too."""
    files = [path for pattern in _COPIED for path in sorted(folder.glob(pattern)) if path.is_file()]
    settings = [read_json(path) for path in (folder / SETTINGS, folder / GENERATION) if path.is_file()]
    if any("auto_map" in each for each in settings):
        files += sorted(folder.glob("*.py"))
    return {path.relative_to(folder).as_posix(): _read(path) for path in files}


def _described(cfg: ModelConfig, file: Path, parsed: dict[str, Any], pad_id: int) -> dict[str, bytes]:
    """A tokenizer.json that adds bos, as training does, unless `cfg` has none; and the roles of its special tokens."""
    data = _read(file)
    inner = tokenizers.Tokenizer.from_buffer(data)
    bos = None if cfg.bos_id is None else inner.id_to_token(cfg.bos_id)
    if bos is not None and cfg.bos_id is not None and inner.encode("").ids[:1] != [cfg.bos_id]:
        processor = _adding_bos(file, parsed.get("post_processor"), bos, cfg.bos_id)
        data = json.dumps({**parsed, "post_processor": processor}, ensure_ascii=False, indent=2).encode()
    settings = {
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": None if cfg.eos_id is None else inner.id_to_token(cfg.eos_id),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": cfg.max_position,
        "pad_token": inner.id_to_token(pad_id),
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {TOKENIZER: data, SETTINGS: _json(settings)}


def _adding_bos(file: Path, before: Any, bos: str, bos_id: int) -> dict[str, Any]:
    """A post-processor that does what `before` does and puts bos in front of a text, and of the second of a pair.

    Of several templates in a sequence `tokenizers` runs only the first rightly, so bos goes into one that is there.
    """
    given = before or {"type": "Sequence", "processors": []}
    parts = given["processors"] if given["type"] == "Sequence" else [given]
    kinds = {part["type"] for part in parts}
    check(
        kinds <= {"ByteLevel", "TemplateProcessing"},
        f"{file}: its post-processor, {' and '.join(sorted(kinds))}, cannot put the model's bos in front of a text; "
        "let it be a TemplateProcessing.",
    )
    if "TemplateProcessing" not in kinds:
        pieces = [{"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")]
        parts = [*parts, {"type": "TemplateProcessing", "single": pieces[:1], "pair": pieces, "special_tokens": {}}]
    parts = [_with_bos(part, bos, bos_id) if part["type"] == "TemplateProcessing" else part for part in parts]
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}


def _with_bos(template: dict[str, Any], bos: str, bos_id: int) -> dict[str, Any]:
    front, between = ({"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1))
    pair: list[dict[str, Any]] = [front]
    for piece in template["pair"]:
        pair += [between, piece] if piece.get("Sequence", {}).get("id") == "B" else [piece]
    tokens = {**template["special_tokens"], bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {**template, "single": [front, *template["single"]], "pair": pair, "special_tokens": tokens}


def _read(file: Path) -> bytes:
    with open_file(file) as stream:
        return stream.read()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
