"""The command line that completes prompts, or serves."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.model.params import init
from dsv3_jax.serving.generate import generate
from tests.small import make_config

PROMPTS = ["def f(x):", "import"]


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", Path(__file__).parents[1] / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """A random model with its tokenizer, as an official folder."""
    tokenizer = tokenizers.train(iter(["def f(x):\n    return x\n" * 20, "import os\n" * 20]), vocab_size=300)
    cfg = make_config(vocab_size=300, mtp_depth=0)
    variables = init(cfg, jax.random.key(0))
    folder = tmp_path_factory.mktemp("model") / "hf"
    file = folder.parent / "tokenizer.json"
    file.write_text(tokenizer.to_json())
    save_pretrained(folder, cfg, variables, "float32", tokenizer=file)
    return folder, cfg, variables, tokenizer


def test_prints_what_generate_returns(serve, exported, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cfg, variables, tokenizer = exported
    assert serve.main(["--model", str(folder), "--prompt", *PROMPTS, "--max-new-tokens", "9"]) == 0
    rows = [[0, *(int(i) for i in tokenizer.encode(prompt))] for prompt in PROMPTS]
    ids = generate(cfg, variables, rows, 9, eos_id=1)
    printed = capsys.readouterr().out
    for prompt, row in zip(PROMPTS, ids, strict=True):
        end = int(np.argmax(row == 1)) if (row == 1).any() else len(row)
        assert prompt + tokenizer.decode(row[:end], skip_special=True) in printed


def test_stops_at_every_token_that_the_folder_declares(serve, exported, tmp_path, capsys) -> None:
    folder, cfg, variables, tokenizer = exported
    folder = shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": [1, 2]}))
    rows = [tokenizer.prompt(prompt)[1:] for prompt in PROMPTS]  # without bos, as that is null
    free = generate(cfg, variables, rows, 9).tolist()
    stop = next(token for token in free[0][2:] if token not in free[0][:2] and token > 5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    assert serve.main(["--model", str(folder), "--prompt", *PROMPTS, "--max-new-tokens", "9"]) == 0
    printed = capsys.readouterr().out
    for prompt, row in zip(PROMPTS, free, strict=True):
        written = itertools.takewhile(lambda token: token not in (1, 2, stop), row)
        assert f"--- {prompt}\n{prompt}{tokenizer.decode(list(written), skip_special=True)}\n" in printed


@pytest.mark.slow
def test_seed_decides_what_is_sampled(serve, exported, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported[0]

    def run(seed: int) -> str:
        arguments = ["--model", str(folder), "--prompt", "def", "--temperature", "1", "--seed", str(seed)]
        assert serve.main([*arguments, "--max-new-tokens", "20"]) == 0
        return capsys.readouterr().out

    assert run(1) == run(1)
    assert len({run(seed) for seed in range(3)}) > 1


def test_a_configuration_file_replaces_functions(serve, exported, tmp_path, capsys) -> None:
    """Which are traced, and raise what tells that they were."""
    file = tmp_path / "mine.py"
    body = "    return dataclasses.replace(ds.functions_for(cfg.precision), route=my_route)\n"
    file.write_text(
        "import dataclasses\nimport dsv3_jax as ds\n"
        "def get_config():\n    return ds.load_config('configs/tiny.py')\n"
        "def my_route(logits, bias, **settings):\n    raise ValueError(f'{logits.dtype} was routed here')\n"
        f"def get_functions(cfg):\n{body}"
    )
    with pytest.raises(ValueError, match="float32 was routed here"):
        serve.main(["--model", str(exported[0]), "--prompt", "a", "--max-new-tokens", "4", "--config", str(file)])
    file.write_text(file.read_text().replace(body, "    return cfg.nothing\n"))
    assert (
        serve.main(["--model", str(exported[0]), "--prompt", "a", "--max-new-tokens", "4", "--config", str(file)]) == 2
    )
    assert "has no attribute 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "nowhere", "--prompt", "a"], "is not a folder"),
        (["--model", "{folder}", "--prompt", "a", "--average"], "is an official folder, which has no moving average"),
        (["--model", "{folder}", "--prompt", "a", "--max-new-tokens", "1000"], "max_position=64"),
        (["--model", "{folder}", "--prompt", "a", "--top-p", "0", "--max-new-tokens", "4"], "top_p=0.0"),
        (["--model", "{folder}", "--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--model", "{folder}", "--prompt", "a", "--max-new-tokens", "1" + 30 * "0"], "exceeds max_position=64"),
        (["--model", "{folder}", "--prompt", "def " * 99, "--max-new-tokens", "1"], "prompt 0 has"),
        (["--model", "{folder}", "--prompt", "a", "--max-new-tokens", "4", "--seed", "9" * 20], "more than 32 bits"),
        (["--model", "{folder}", "--prompt", "a", "caf\udce9"], r"--prompt 'caf\udce9' is not valid UTF-8"),
        (["--model", "nowhere", "--port", "0"], "is not a folder"),
        (["--model", "{folder}", "--port", "70000"], "--port 70000 must lie in 0..65535"),
        (["--model", "{folder}", "--host", "0.0.0.0"], "needs a key"),
        (["--model", "{folder}", "--host", "0.0.0.0", "--api-key-file", "nothing"], "cannot be read"),
        (["--model", "{folder}", "--port", "0", "--chat-format", "r1"], "which the tokenizer lacks"),
        (["--model", "{folder}", "--port", "0", "--max-num-seqs", "0"], "max_num_seqs=0 must be at least 1"),
        (["--model", "{folder}", "--port", "0", "--drain-seconds", "nan"], "drain_seconds=nan"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(serve, exported, capsys, arguments, says) -> None:
    arguments = [argument.format(folder=exported[0]) for argument in arguments]
    assert serve.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_shapes_of_a_server_are_listed(serve, exported, capsys) -> None:
    arguments = ["--model", str(exported[0]), "--max-num-seqs", "2", "--print-shapes"]
    assert serve.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decode") for line in lines)
    assert 3 <= len(lines) == len(set(lines)) <= 16


def test_missing_tokenizer_is_named(serve, exported, tmp_path, capsys) -> None:
    folder = exported[0]
    for file in folder.iterdir():
        if file.name not in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert serve.main(["--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
