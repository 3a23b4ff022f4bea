"""Speed of a training step: forward, backward and AdamW, the step that `train.py` runs.

    python -m dsv3_jax.bench.train configs/bench_30m.py
    python -m dsv3_jax.bench.train configs/bench_30m.py --experts 64
    python -m dsv3_jax.bench.train configs/bench_30m.py --peer PYTHON --json

One micro-batch of the configuration (`train.batch.micro` rows of `train.seq_len` random tokens). With `--peer`, the
model of the same shape in transformers takes turns with ours, step by step; PYTHON is an interpreter that has torch
and transformers. With `--experts`, so does our model with that many experts and the same number chosen.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from dsv3_jax.bench.machine import describe, peak_memory_gib
from dsv3_jax.bench.peer_client import Peer
from dsv3_jax.bench.timing import median_ratio, summary, take_turns, timed
from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.interrupt import run_program
from dsv3_jax.model.functions import functions_for
from dsv3_jax.planning.flops import train_flops_per_token
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import Rates, make_step
from dsv3_jax.typing import Array

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    keep_freed_memory()
    try:
        check(given.rounds > 0, f"--rounds {given.rounds} must be at least 1.")
        cfg = load_config(given.config, given.set)
        result = measure(cfg, rounds=given.rounds, num_experts=given.experts, peer_python=given.peer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if given.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def measure(
    cfg: RunConfig, *, rounds: int = 7, num_experts: int | None = None, peer_python: str | None = None
) -> dict[str, Any]:
    """What `--json` prints. Ratios are medians over rounds of seconds by seconds; above 1 means that we are faster.

    Raises:
        UserError: an impossible number of experts, or a peer that cannot run.
    """
    batch, seq_len = cfg.train.batch.micro, cfg.train.seq_len
    tokens = batch * seq_len
    many = None
    if num_experts is not None:
        many = dataclasses.replace(cfg.model, moe=dataclasses.replace(cfg.model.moe, num_experts=num_experts))
    machine = describe(functions_for(cfg.precision).compute_dtype)
    parameters: dict[str, int] = {}
    ours, parameters["ours"], losses = training_program(cfg)
    compile_s = ours()
    ours()
    memory = peak_memory_gib()
    programs = {"ours": ours}
    if many is not None:
        programs["many_experts"], parameters["many_experts"], _ = training_program(dataclasses.replace(cfg, model=many))
    if peer_python is not None:
        with Peer(peer_python, cfg.model, batch=batch, seq_len=seq_len, threads=machine["cores"]) as peer:
            seconds = _warm_and_take_turns(programs | {"peer": lambda: peer.seconds("train")}, rounds)
            built = peer.built
    else:
        seconds, built = _warm_and_take_turns(programs, rounds), {}

    flops = train_flops_per_token(cfg.model, seq_len)
    speed = _speed(seconds["ours"], tokens)
    result = {
        "config": cfg.name,
        "parameters": parameters["ours"],
        "batch": batch,
        "seq_len": seq_len,
        "precision": cfg.precision,
        "rounds": rounds,
        **speed,
        "compile_s": compile_s,
        "losses": [float(losses[0]), float(losses[-1])],
        "steps": len(losses),
        "flops_per_token": flops,
        "mfu": speed["tokens_per_s"] * flops / (machine["matmul_gflops"] * 1e9),
        "peak_memory_gib": memory,
        **machine,
    }
    if many is not None:
        cost = median_ratio(seconds["many_experts"], seconds["ours"])
        speed = _speed(seconds["many_experts"], tokens)
        result["many_experts"] = {
            "num_experts": num_experts,
            "parameters": parameters["many_experts"],
            **speed,
            "cost_ratio": cost,
        }
    if built:
        ratio = median_ratio(seconds["peer"], seconds["ours"])
        result["peer"] = {**built, **_speed(seconds["peer"], tokens), "ratio": ratio}
    return result


def training_program(cfg: RunConfig) -> tuple[Callable[[], float], int, list[Array]]:
    """A program that makes one training step on random tokens, always the same, and returns its seconds.

    With it come the parameter count, and a list to which each step appends its loss.
    """
    step = make_step(cfg)
    state = [init_state(cfg)]
    batches = stack([random_batch(cfg)])
    rates = Rates(np.float32(cfg.train.lr.low), np.float32(0.1), np.float32(cfg.train.auxiliary.bias_speed))

    losses: list[Array] = []

    def program() -> float:
        def work() -> Any:
            state[0], report = step(state[0], batches, rates)
            losses.append(report.loss)
            return state[0], report

        return timed(work)

    return program, sum(leaf.size for leaf in jax.tree.leaves(state[0].params)), losses


def random_batch(cfg: RunConfig) -> Batch:
    """One micro-batch of random tokens, every label counted."""
    rng = np.random.default_rng(0)
    B, T, depths = cfg.train.batch.micro, cfg.train.seq_len, cfg.model.mtp_depth + 1
    tokens = rng.integers(0, cfg.model.vocab_size, (B, T + depths), dtype=np.int32)
    labels = np.stack([tokens[:, 1 + depth : 1 + depth + T] for depth in range(depths)])
    return Batch(tokens[:, :T], labels, np.ones((depths, B, T), np.float32))


def _warm_and_take_turns(programs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    take_turns(programs, rounds=1)
    return take_turns(programs, rounds=rounds)


def _speed(seconds: list[float], tokens: int) -> dict[str, float]:
    times = summary(seconds)
    return {"tokens_per_s": tokens / times["median_s"], **times}


def _print_table(result: dict[str, Any]) -> None:
    table = rich.table.Table(
        title=f"{result['config']}: a step of {result['batch']} x {result['seq_len']} tokens, {result['precision']}"
    )
    for column in ("", "parameters", "tokens/s", "step s (min, max)", "time against ours"):
        table.add_column(column, justify="left" if column == "" else "right")

    def row(name: str, entry: dict[str, Any], relative: float) -> None:
        times = f"{entry['median_s']:.3f} ({entry['min_s']:.3f}, {entry['max_s']:.3f})"
        table.add_row(name, f"{entry['parameters']:,}", f"{entry['tokens_per_s']:.0f}", times, f"{relative:.2f}")

    row("dsv3-jax", result, 1.0)
    if "many_experts" in result:
        many = result["many_experts"]
        row(f"with {many['num_experts']} experts", many, many["cost_ratio"])
    if "peer" in result:
        row(f"transformers {result['peer']['transformers']}", result["peer"], result["peer"]["ratio"])
    console = rich.console.Console()
    console.print(table)
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    first, last = result["losses"]
    console.print(
        f"MFU {result['mfu']:.1%} of {result['matmul_gflops']:.0f} GFLOP/s measured · "
        f"{result['flops_per_token'] / 1e6:.1f} MFLOP a token · peak memory {result['peak_memory_gib']:.2f} GiB · "
        f"first step {result['compile_s']:.1f} s · loss {first:.3f}, after {result['steps']} steps {last:.3f}\n"
        f"{result['device']}, {result['cores']} cores · {versions} · commit {result['commit']}",
        highlight=False,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.bench.train", description="Speed of a training step.")
    add_config_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each model; the median counts")
    parser.add_argument("--experts", type=int, metavar="N", help="also measure the model with N experts")
    parser.add_argument("--peer", metavar="PYTHON", help="also measure transformers, with this interpreter")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
