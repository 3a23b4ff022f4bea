"""What goes along with the weights: a tokenizer that describes itself, or an official folder's own files."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.config.check import UserError
from dsv3_jax.data import tokenizer as project_tokenizer
from dsv3_jax.interop.hf_tokenizer import companion_files, declared_ids

TEXT = "def main(argv):\n    return argv\n" * 3


@pytest.fixture(scope="module")
def trained() -> project_tokenizer.TextTokenizer:
    """A tokenizer of the project, with 270 tokens."""
    return project_tokenizer.train(iter([TEXT]), vocab_size=270)


@pytest.fixture
def cfg(small):
    """A model with room for it."""
    return dataclasses.replace(small, vocab_size=280)


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def settings_of(files: dict[str, bytes]) -> dict:
    return json.loads(files["tokenizer_config.json"])


def test_other_programs_begin_a_text_as_training_does_and_ours_adds_no_second_bos(trained, cfg, tmp_path):
    (tmp_path / "made.json").write_text(trained.to_json())
    folder = written(companion_files(cfg, tmp_path / "made.json"), tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = project_tokenizer.load(folder)
    for text in ("def main(", "", "é\n<|eos_token|>"):
        assert ours.encode(text).tolist() == trained.encode(text).tolist()
        theirs.encode_special_tokens = True
        assert theirs.encode(text).ids == [0, *trained.encode(text)]
        assert theirs.encode(text, add_special_tokens=False).ids == trained.encode(text).tolist()
    assert theirs.encode("def", "main").ids == [0, *trained.encode("def"), 0, *trained.encode("main")]
    again = companion_files(cfg, folder / "tokenizer.json")
    assert again["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_special_tokens_and_inputs_are_named(trained, cfg, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    files = companion_files(cfg, tmp_path)
    assert settings_of(files) == {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<|bos_token|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|eos_token|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": cfg.max_position,
        "pad_token": "<|pad_token|>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads(companion_files(cfg, None)["generation_config.json"])["pad_token_id"] == cfg.eos_id


PROCESSORS = {
    "none": (None, [0]),
    "bytes": (tokenizers.processors.ByteLevel(trim_offsets=False), [0]),
    "adds eos": (tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]), [0, 1]),
    "adds bos": (tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]), [0]),
    "bytes, then eos": (
        tokenizers.processors.Sequence(
            [
                tokenizers.processors.ByteLevel(trim_offsets=False),
                tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
            ]
        ),
        [0, 1],
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_bos_comes_once_whatever_a_tokenizer_did_before(cfg, tmp_path, case):
    processor, expected = PROCESSORS[case]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "[UNK]": 3}, "[UNK]"))
    inner.add_special_tokens(["<s>", "</s>"])
    if processor is not None:
        inner.post_processor = processor
    inner.save(str(tmp_path / "given.json"))
    files = companion_files(cfg, tmp_path / "given.json")
    theirs = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    assert theirs.encode("").ids == expected
    assert theirs.encode("a").ids == [0, 2, *expected[1:]]
    assert settings_of(files)["pad_token"] == "</s>"
    assert (files["tokenizer.json"] == (tmp_path / "given.json").read_bytes()) == (case == "adds bos")


OFFICIAL = {
    "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizerFast",   "add_bos_token": true}',
    "special_tokens_map.json": '{ "pad_token": "<|pad_token|>" }',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": '{"temperature": 0.6, "eos_token_id": [1, 5]}',
}


def test_an_official_folder_goes_along_byte_for_byte(trained, cfg, tmp_path):
    files = {**{name: text.encode() for name, text in OFFICIAL.items()}, "tokenizer.json": trained.to_json().encode()}
    folder = written({**files, "README.md": b"x", "modeling.py": b"x", "model.safetensors": b"x"}, tmp_path / "in")
    assert companion_files(cfg, folder) == files
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}')
    assert companion_files(cfg, folder)["modeling.py"] == b"x"


def test_ids_that_only_config_json_names_go_along(cfg, tmp_path):
    config = {"bos_token_id": None, "eos_token_id": [1, 5], "pad_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert declared_ids(cfg, tmp_path) == {"eos_token_id": [1, 5], "pad_token_id": 3}
    files = companion_files(cfg, tmp_path)
    assert files.keys() == {"generation_config.json"}
    made = json.loads(files["generation_config.json"])
    assert made == {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 3}
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 1]}')
    assert declared_ids(cfg, tmp_path) == {}


DAMAGED = {
    "no such file": (None, "is missing"),
    "no tokenizer": (b'{"model": 3}', "no tokenizer"),
    "no JSON": (b"{", "JSON"),
    "no UTF-8": (b'{"a": "\xff"}', "JSON|UTF-8"),
    "deep": (b"[" * 100_000, "JSON|deep|nested"),
    "an empty file": (b"", "JSON"),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_one_sentence(trained, cfg, tmp_path, case, name):
    data, reason = DAMAGED[case]
    if name != "tokenizer.json" and case in ("no such file", "no tokenizer"):
        return
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason) as caught:
        companion_files(cfg, tmp_path / "none.json" if data is None else tmp_path)
    assert "\n" not in str(caught.value)


def test_no_bos_is_added_where_the_model_has_none_or_the_tokenizer_cannot(trained, cfg, tmp_path):
    (tmp_path / "made.json").write_text(trained.to_json())
    files = companion_files(dataclasses.replace(cfg, bos_id=None), tmp_path / "made.json")
    assert files["tokenizer.json"] == (tmp_path / "made.json").read_bytes()
    assert (settings_of(files)["add_bos_token"], settings_of(files)["bos_token"]) == (False, None)
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": 1, "pad_token_id": 2}
    bert = {"type": "BertProcessing", "sep": ["<|eos_token|>", 1], "cls": ["<|eos_token|>", 1]}
    (tmp_path / "bert.json").write_text(json.dumps(json.loads(trained.to_json()) | {"post_processor": bert}))
    with pytest.raises(UserError, match="its post-processor, BertProcessing, cannot put"):
        companion_files(cfg, tmp_path / "bert.json")


def test_a_tokenizer_of_another_model_or_a_folder_of_something_else_is_refused(trained, cfg, small, tmp_path):
    (tmp_path / "made.json").write_text(trained.to_json())
    with pytest.raises(UserError, match=f"token id 269, but vocab_size={small.vocab_size}"):
        companion_files(small, tmp_path / "made.json")
    with pytest.raises(UserError, match="is no official folder"):
        companion_files(cfg, tmp_path)
