"""A folder of ours in transformers: the usual snippets, without a warning, token for token what `generate` gives.

`DSV3_TRANSFORMERS_PYTHON` names interpreters that have torch and transformers, separated as in PATH.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import pytest

import dsv3_jax as ds
from dsv3_jax.data import tokenizer as project_tokenizer
from dsv3_jax.serving.generate import generate

PYTHONS = os.environ.get("DSV3_TRANSFORMERS_PYTHON", "")
PROMPTS = ["def main(", "import os\n", "x"]
NEW_TOKENS = 8

# What pipeline() of transformers 4 logs as a warning about every model.
OF_THE_LIBRARY = (
    "Device set to use",
    "The following generation flags are not valid and may be ignored: ['temperature']",
)


@pytest.fixture(scope="module")
def folder(repository, tmp_path_factory) -> Path:
    """An export with a tokenizer of the project and weights large enough that no two tokens are nearly as likely."""
    folder = tmp_path_factory.mktemp("transformers")
    trained = project_tokenizer.train(iter([(repository / "serve.py").read_text()]), vocab_size=300)
    (folder / "tokenizer.json").write_text(trained.to_json())
    tiny = ds.load_config(repository / "configs" / "tiny.py").model
    cfg = dataclasses.replace(tiny, vocab_size=300, max_position=128, init_std=0.2)
    variables = ds.init(cfg, jax.random.key(0))
    ds.save_pretrained(folder / "out", cfg, variables, "float32", tokenizer=folder, with_mtp=False)
    return folder / "out"


@pytest.mark.skipif(not PYTHONS, reason="DSV3_TRANSFORMERS_PYTHON names no Python that has torch and transformers")
@pytest.mark.parametrize("python", PYTHONS.split(os.pathsep))
def test_the_usual_snippets_continue_a_prompt_as_ours_does(folder, python):
    request = json.dumps({"prompts": PROMPTS, "new_tokens": NEW_TOKENS})
    program = Path(__file__).with_name("transformers_program.py")
    done = subprocess.run([python, program, folder], input=request, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    print("transformers {}, torch {}".format(*theirs["versions"]))
    assert [line for line in theirs["logged"] if not line.startswith(OF_THE_LIBRARY)] == []

    cfg, variables = ds.load_pretrained(folder)
    tokenizer = project_tokenizer.load(folder, bos_id=cfg.bos_id, eos_id=cfg.eos_id)
    prompts = [tokenizer.prompt(prompt) for prompt in PROMPTS]
    ours = [generate(cfg, variables, [prompt], NEW_TOKENS)[0].tolist() for prompt in prompts]
    assert theirs["prompts"] == prompts
    assert theirs["alone"] == ours
    assert theirs["batch"] == ours
    assert theirs["pipeline"] == PROMPTS[0] + tokenizer.decode(ours[0])
