"""Completes prompts with a trained model.

    python serve.py --model runs/tiny --prompt "def main("
    python serve.py --model exported --prompt "import os" "class Stack:" --temperature 0.8 --top-p 0.95 --seed 1
    python serve.py --model runs/mine --config my_router.py --prompt "def main("

The model is a training run, or a folder in the official format that has a tokenizer.json. A run whose configuration
file replaced functions of a layer (`get_functions(cfg)`) is given that file again.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.paths import user_path
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.interop.run_dir import is_run, load
from dsv3_jax.interop.stop_tokens import stop_ids
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import Functions
from dsv3_jax.serving.generate import generate
from dsv3_jax.training.replaced import functions_in

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = parse(arguments)
    try:
        for prompt, completion in complete(given):
            if len(given.prompt) > 1:
                print(f"--- {prompt}")
            print(prompt + completion)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def complete(given: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, completion) of each prompt, all in one batch; special tokens in a completion are left out."""
    folder = user_path(given.model)
    cfg, variables = load(folder, dtype=given.dtype, average=given.average)
    tokenizer = tokenizers.load(tokenizer_file(folder), bos_id=cfg.bos_id, eos_id=cfg.eos_id)
    stops = [cfg.eos_id] if is_run(folder) and cfg.eos_id is not None else stop_ids(folder, cfg)
    for prompt in given.prompt:
        is_text = not any("\ud800" <= character <= "\udfff" for character in prompt)  # bytes that were no UTF-8
        check(is_text, f"--prompt {prompt!r} is not valid UTF-8; give text in UTF-8.")
    ids = generate(
        cfg,
        variables,
        [tokenizer.prompt(prompt) for prompt in given.prompt],
        given.max_new_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
        eos_id=stops,
        functions=functions_of_file(given.config, given.dtype),
    )
    completions = []
    for prompt, row in zip(given.prompt, ids.tolist(), strict=True):
        written = list(itertools.takewhile(lambda token: token not in stops, row))
        completions.append((prompt, tokenizer.decode(written, skip_special=True)))
    return completions


def functions_of_file(path: str | None, dtype: str) -> Functions | None:
    """What `get_functions(cfg)` of a configuration file gives for parameters of `dtype`; None without a file."""
    if path is None:
        return None
    return functions_in(path, dataclasses.replace(load_config(path), precision=dtype))


def tokenizer_file(folder: Path) -> Path:
    """Where `folder` has its tokenizer."""
    file = folder / "tokenizer.json"
    check(file.is_file(), f"{file} is missing; put the tokenizer.json that the model was trained with there.")
    return file


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser: Any = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a run dir of train.py, or an official folder")
    parser.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="one or more texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest P; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--config", metavar="FILE", help="whose get_functions(cfg) replaces functions of a layer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    parser.add_argument("--average", action="store_true", help="of a run: the moving average of the parameters")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
