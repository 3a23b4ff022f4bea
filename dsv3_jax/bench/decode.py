"""Speed of generation: greedy decoding at several batch sizes, and prefill of one long prompt.

    python -m dsv3_jax.bench.decode configs/bench_30m.py
    python -m dsv3_jax.bench.decode configs/bench_30m.py --peer PYTHON --json

Times `generate` itself, prefill included: random prompts of 32 tokens, 128 new ones. With `--peer`, the model of the
same shape in transformers takes turns with ours; PYTHON is an interpreter that has torch and transformers.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from dsv3_jax.bench.machine import describe, peak_memory_gib
from dsv3_jax.bench.peer_client import Peer
from dsv3_jax.bench.timing import median_ratio, summary, take_turns, timed
from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import functions_for
from dsv3_jax.model.params import init
from dsv3_jax.planning.flops import forward_flops_by_part
from dsv3_jax.serving.generate import generate

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    try:
        check(given.rounds > 0, f"--rounds {given.rounds} must be at least 1.")
        cfg = load_config(given.config, given.set)
        result = measure(cfg, given.batch, rounds=given.rounds, peer_python=given.peer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if given.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def measure(
    cfg: RunConfig,
    batches: list[int],
    *,
    prompt: int = 32,
    new: int = 128,
    prefill: int = 512,
    rounds: int = 5,
    peer_python: str | None = None,
) -> dict[str, Any]:
    """What `--json` prints: `batch{B}` for each batch size and `prefill`, each with `tokens_per_s`.

    `tokens_per_s` counts new tokens over the whole call; for prefill, prompt tokens. `ratio` is the median over rounds
    of the peer's seconds by ours; above 1 means that we are faster. `roofline` is the share of the physical limit: the
    weights that a step must read, over its time, by `memory_gbytes_per_s`, what a matrix times a vector reads here.

    Raises:
        UserError: lengths beyond the model, or a peer that cannot run.
    """
    functions = functions_for(cfg.precision)
    machine = describe(functions.compute_dtype)
    variables = init(cfg.model, jax.random.key(cfg.seed), dtype=functions.param_dtype)
    rng = np.random.default_rng(0)

    def completion(batch: int, prompt: int, new: int) -> Callable[[], float]:
        ids = rng.integers(0, cfg.model.vocab_size, (batch, prompt))
        return lambda: timed(lambda: generate(cfg.model, variables, ids, new, functions=functions))

    ours = {f"batch{batch}": completion(batch, prompt, new) for batch in batches}
    ours["prefill"] = completion(1, prefill, 1)
    programs = dict(ours)
    with contextlib.ExitStack() as stack:
        built: dict[str, Any] = {}
        if peer_python is not None:
            peer = stack.enter_context(Peer(peer_python, cfg.model, batch=1, seq_len=8, threads=machine["cores"]))
            built = peer.built
            for batch in batches:
                programs[f"peer batch{batch}"] = lambda batch=batch: peer.seconds(
                    "decode", batch=batch, prompt=prompt, new=new
                )
            programs["peer prefill"] = lambda: peer.seconds("prefill", tokens=prefill)
        take_turns(programs, rounds=1)  # compiles
        seconds = take_turns(programs, rounds=rounds)

    memory = peak_memory_gib()
    result: dict[str, Any] = {
        "config": cfg.name,
        "precision": cfg.precision,
        "prompt": prompt,
        "new": new,
        "prefill_tokens": prefill,
        "rounds": rounds,
        "memory_gbytes_per_s": measure_memory_rate() / 1e9,
        "peak_memory_gib": memory,
        **machine,
        **({"peer": built} if built else {}),
    }
    for name in ours:
        tokens = prefill if name == "prefill" else int(name.removeprefix("batch")) * new
        times = summary(seconds[name])
        result[name] = {"tokens_per_s": tokens / times["median_s"], **times}
        if name != "prefill":
            read = weight_bytes_per_step(cfg.model, tokens // new, jnp.dtype(functions.param_dtype).itemsize) * new
            result[name]["roofline"] = read / times["median_s"] / 1e9 / result["memory_gbytes_per_s"]
        if built:
            theirs = seconds[f"peer {name}"]
            result[name]["peer_tokens_per_s"] = tokens / summary(theirs)["median_s"]
            result[name]["ratio"] = median_ratio(theirs, seconds[name])
    return result


def weight_bytes_per_step(cfg: ModelConfig, batch: int, bytes_per_weight: int) -> float:
    """Bytes of weights that one decoding step of `batch` tokens must read once, if routing is uniform.

    A token's multiplications are two for each weight it uses; a batch shares all weights but those of the experts, of
    which it meets E·(1 - (1 - K/E)^batch).
    """
    flops = forward_flops_by_part(cfg, seq_len=1)
    shared = sum(flops[part] for part in ("mla_projections", "dense_ffn", "router", "head")) / 2
    expert = 3 * cfg.model_dim * cfg.moe.expert_dim
    distinct = cfg.moe.num_experts * (1 - (1 - cfg.moe.top_k / cfg.moe.num_experts) ** batch)
    routed = cfg.num_moe_layers * expert * (distinct + cfg.moe.num_shared_experts)
    return bytes_per_weight * (shared + routed)


def measure_memory_rate(size: int = 8192, repeats: int = 5) -> float:
    """Bytes a second that a float32 matrix-vector multiplication of 256 MiB reads; the best of `repeats`."""
    matrix, vector = jnp.ones((size, size), jnp.float32), jnp.ones(size, jnp.float32)
    multiply = jax.jit(lambda vector, matrix: vector @ matrix)
    timed(lambda: multiply(vector, matrix))
    return matrix.nbytes / min(timed(lambda: multiply(vector, matrix)) for _ in range(repeats))


def _print_table(result: dict[str, Any]) -> None:
    table = rich.table.Table(
        title=f"{result['config']}: {result['prompt']} + {result['new']} tokens greedy, {result['precision']}"
    )
    table.add_column("")
    for column in ("tokens/s", "seconds (min, max)", "of memory's rate", "transformers", "times as fast"):
        table.add_column(column, justify="right")
    for name, entry in result.items():
        if not (name.startswith("batch") or name == "prefill"):
            continue
        table.add_row(
            f"prefill of {result['prefill_tokens']}" if name == "prefill" else name.replace("batch", "batch "),
            f"{entry['tokens_per_s']:.0f}",
            f"{entry['median_s']:.3f} ({entry['min_s']:.3f}, {entry['max_s']:.3f})",
            f"{entry['roofline']:.0%}" if "roofline" in entry else "",
            f"{entry['peer_tokens_per_s']:.0f}" if "ratio" in entry else "not measured",
            f"{entry['ratio']:.2f}" if "ratio" in entry else "not measured",
        )
    console = rich.console.Console()
    console.print(table)
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"memory {result['memory_gbytes_per_s']:.1f} GB/s measured · peak memory {result['peak_memory_gib']:.2f} GiB · "
        f"median of {result['rounds']} rounds\n"
        f"{result['device']}, {result['cores']} cores · {versions} · commit {result['commit']}",
        highlight=False,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.bench.decode", description="Speed of generation.")
    add_config_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each; the median counts")
    parser.add_argument("--peer", metavar="PYTHON", help="also measure transformers, with this interpreter")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
