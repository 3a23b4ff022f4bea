"""Serves a trained model to OpenAI's clients, or completes prompts and ends.

    python serve.py --model runs/tiny                                   # http://127.0.0.1:8000: open it in a browser
    python serve.py --model runs/tiny --port 8080 --max-num-seqs 32     # more requests at once
    python serve.py --model exported --host 0.0.0.0 --api-key-file key.txt
    python serve.py --model runs/tiny --prompt "def main("              # no server: prints the completion
    python serve.py --model exported --prompt "import os" "class Stack:" --temperature 0.8 --top-p 0.95 --seed 1
    python serve.py --model runs/mine --config my_router.py --prompt "def main("

The model is a training run, or a folder in the official format. Without a tokenizer.json, a server takes and gives
token ids. A run whose configuration file replaced functions of a layer (`get_functions(cfg)`) is given that file again.

A server answers /v1/completions and /v1/chat/completions; /openapi.json lists all routes. It listens at once, and
answers 503 until its steps are compiled (/ready tells). SIGTERM or Ctrl-C lets running requests end; a second one does
not.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.interop.run_dir import is_run, load
from dsv3_jax.interop.stop_tokens import stop_ids
from dsv3_jax.interrupt import leave, run_program
from dsv3_jax.model.functions import Functions
from dsv3_jax.serving.chat_format import NAMES, chat_format_of
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.generate import generate
from dsv3_jax.serving.http.app import create_app
from dsv3_jax.serving.http.logs import log_to_stderr
from dsv3_jax.serving.http.server import KEY_VARIABLE, api_key_of, bind, serve
from dsv3_jax.serving.runner import Runner
from dsv3_jax.training.replaced import functions_in

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = parse(arguments)
    try:
        if given.print_shapes:
            return print_shapes(given)
        if given.prompt is None:
            return serve_forever(given)
        for prompt, completion in complete(given):
            if len(given.prompt) > 1:
                print(f"--- {prompt}")
            print(prompt + completion)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def serve_forever(given: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    key, begin = api_key_of(given.api_key_file), time.monotonic()
    serving = serving_config(given)
    with bind(given.host, given.port, has_key=key is not None) as sock:  # first: a wrong port is told at once
        folder = user_path(given.model)
        cfg, variables = load(folder, dtype=given.dtype, average=given.average)
        file = folder / "tokenizer.json"
        tokenizer = tokenizers.load(file, bos_id=cfg.bos_id, eos_id=cfg.eos_id) if file.is_file() else None
        chat_format = None if tokenizer is None else chat_format_of(folder, tokenizer, name=given.chat_format)
        functions = functions_of_file(given.config, given.dtype)
        store_compiled_steps()
        log_to_stderr()
        engine = Engine(
            cfg,
            variables,
            serving,
            tokenizer,
            eos_ids=declared_stops(folder, cfg),
            functions=functions,
            warm_up=lambda done, all_: print(f"compiled {done} of {all_} steps after {time.monotonic() - begin:.1f} s"),
        )
        app = create_app(
            engine,
            model_name=given.served_model_name or given.model,
            api_key=key,
            chat_format=chat_format,
            metrics_namespace=given.metrics_namespace,
        )
        return leave(serve(app, engine, sock))  # a step that is being compiled cannot be ended otherwise


def print_shapes(given: argparse.Namespace) -> int:
    """Lists the steps that a server would compile."""
    cfg, variables = load(user_path(given.model), dtype=given.dtype, average=given.average)
    runner = Runner(cfg, variables, serving_config(given), functions=functions_of_file(given.config, given.dtype))
    print("\n".join(runner.shapes()))
    return 0


def store_compiled_steps() -> None:
    """Lets the next start find them, where JAX_COMPILATION_CACHE_DIR names no other place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "dsv3-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def serving_config(given: argparse.Namespace) -> ServingConfig:
    """The engine's room and the server's limits."""
    return ServingConfig(
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=given.max_num_batched_tokens,
        num_pages=given.num_pages,
        max_output_tokens=given.max_output_tokens,
        prefix_cache=not given.no_prefix_cache,
        batch_invariant=given.batch_invariant,
        drain_seconds=given.drain_seconds,
    )


def complete(given: argparse.Namespace) -> list[tuple[str, str]]:
    """(prompt, completion) of each prompt, all in one batch; special tokens in a completion are left out."""
    folder = user_path(given.model)
    cfg, variables = load(folder, dtype=given.dtype, average=given.average)
    tokenizer = tokenizers.load(tokenizer_file(folder), bos_id=cfg.bos_id, eos_id=cfg.eos_id)
    stops = declared_stops(folder, cfg)
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


def declared_stops(folder: Path, cfg: ModelConfig) -> tuple[int, ...]:
    """The ids that end a completion."""
    if is_run(folder):
        return () if cfg.eos_id is None else (cfg.eos_id,)
    return stop_ids(folder, cfg)


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
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run dir of train.py, or an official folder")
    add("--config", metavar="FILE", help="whose get_functions(cfg) replaces functions of a layer")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters")
    add("--average", action="store_true", help="of a run: the moving average of the parameters")
    add_server(parser.add_argument_group("a server").add_argument)
    add_prompts(parser.add_argument_group("completing prompts instead").add_argument)
    return parser.parse_args(arguments)


def add_server(add: Callable[..., Any]) -> None:
    """What only a server reads."""
    default = ServingConfig()
    add("--port", type=int, default=8000, metavar="N", help="default 8000; 0: any free one")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1; others need a key")
    add("--api-key-file", metavar="FILE", help=f"holds the key that clients must send; or set {KEY_VARIABLE}")
    add("--served-model-name", metavar="NAME", help="what clients call the model; default: DIR")
    add("--chat-format", choices=NAMES, help="of conversations; default: what the folder's chat template shows")
    add("--metrics-namespace", default="dsv3", metavar="NAME", help="default dsv3; vllm gives vLLM's names at /metrics")
    add("--max-num-seqs", type=int, default=default.max_num_seqs, metavar="N", help="that run at once; default 16")
    add("--max-num-batched-tokens", type=int, metavar="N", help="of one step; default 128 on a CPU, else 2048")
    add("--num-pages", type=int, metavar="N", help="of the cache, 64 tokens each; default: 2048 tokens a sequence")
    add("--max-output-tokens", type=int, metavar="N", help="of one completion; default: all its prompt leaves")
    add("--no-prefix-cache", action="store_true", help="compute every prompt anew")
    add("--batch-invariant", action="store_true", help="the same bits whoever runs beside, at the cost of padding")
    add("--drain-seconds", type=float, default=default.drain_seconds, metavar="S", help="after SIGTERM; default 30")
    add("--print-shapes", action="store_true", help="list the steps that would be compiled, and end")


def add_prompts(add: Callable[..., Any]) -> None:
    """What only completing offline reads."""
    add("--prompt", nargs="+", metavar="TEXT", help="one or more texts to continue")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest P; 1: all")
    add("--seed", type=int, default=0, help="of the sampling")


if __name__ == "__main__":
    run_program(main)
