"""Speed of a server: load on any OpenAI-compatible URL, or our own server and engine against their goals.

    python -m dsv3_jax.bench.serve --url http://127.0.0.1:8000/v1 --concurrency 1 8 16
    python -m dsv3_jax.bench.serve --config configs/bench_30m.py --peer PYTHON

Throughputs and latencies are those of `vllm bench serve`: TTFT, TPOT = (latency - TTFT) / (tokens - 1), ITL, E2EL and
goodput. Prompts and answers are random, with log-normal lengths of ShareGPT's means, cut to the model. With `--rate`
requests come as a Poisson process. `--config` serves random weights of that shape; every line with a goal is in turns
with what it is compared with. PYTHON is an interpreter that has transformers[serving] and torch, or llama_cpp.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from dsv3_jax.bench import goals, serve_latency, serve_turns
from dsv3_jax.bench.latency import MEASURES, Answer, summarize
from dsv3_jax.bench.load_client import Target, ask, find, run
from dsv3_jax.bench.machine import describe
from dsv3_jax.bench.random_model import export, export_for_peers, random_variables
from dsv3_jax.bench.serve_plot import plot
from dsv3_jax.bench.servers import our_server, run_with_servers
from dsv3_jax.bench.workload import Request, arrivals, requests
from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.paths import user_path
from dsv3_jax.progress import progress

EXIT_USER_ERROR = 2
_LONGEST = 2048
"""Tokens of prompt and answer where the server does not say how long they may be."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    try:
        _check(given)
        result = _url(given) if given.url else _config(given)
        if given.plot:
            plot(result, user_path(given.plot))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(json.dumps(result)) if given.json else _print_tables(result)
    return 0


def _url(given: argparse.Namespace) -> dict[str, Any]:
    target, longest = asyncio.run(find(given.url, model=given.model, key=given.key, is_plain=given.plain))
    return {"url": given.url, "model": target.model, "load": _loads(given, target, longest, given.vocab_size)}


def _config(given: argparse.Namespace) -> dict[str, Any]:
    cfg = load_config(given.config, given.set)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(cfg, Path(scratch) / "ours")
        peers = None
        if given.peer is not None:
            theirs = export_for_peers(folder, Path(scratch) / "peer", vocab_size=cfg.model.vocab_size)
            peers = serve_turns.Peers(given.peer, theirs)
        variables = random_variables(cfg)
        lines, seconds = serve_turns.measure(cfg, variables, folder, rounds=given.rounds, peers=peers)
        with progress("waiting times", serve_latency.NUM_PARTS) as advance:
            lines += serve_latency.measure(
                folder, vocab_size=cfg.model.vocab_size, rounds=given.rounds, advance=advance
            )
        with our_server(folder) as running:
            target, longest = asyncio.run(find(running.url, model=None, key=None, is_plain=False))
            load = _loads(given, target, longest or cfg.model.max_position, cfg.model.vocab_size)
    about = describe(np.dtype("float32"))
    return {
        "config": cfg.name,
        "rounds": given.rounds,
        "lines": [line.as_dict() for line in lines],
        "seconds": seconds,
        "load": load,
        **about,
    }


def _loads(given: argparse.Namespace, target: Target, longest: int | None, vocab_size: int) -> list[dict[str, Any]]:
    """One row for each concurrency."""
    limits = {name: value for name in MEASURES if (value := getattr(given, f"goal_{name}")) is not None}
    count = {concurrency: given.requests or max(16, 4 * concurrency) for concurrency in given.concurrency}
    rows = []
    with progress("load", sum(count.values())) as advance:
        for concurrency in given.concurrency:
            rng = np.random.default_rng([given.seed, concurrency])  # no prompt is sent twice: it might be cached
            first, *sent = requests(
                rng,
                1 + count[concurrency],
                vocab_size=vocab_size,
                max_length=longest or _LONGEST,
                prefix_tokens=given.prefix_tokens,
                lengths=None if given.lengths is None else tuple(given.lengths),
            )
            due = arrivals(rng, len(sent), given.rate)
            answers, errors, seconds = asyncio.run(
                _load(target, first, sent, due=due, concurrency=concurrency, advance=advance)
            )
            summary = summarize(answers, seconds=seconds, failed=len(errors), limits=limits)
            rows.append({"concurrency": concurrency, "rate": given.rate, **summary, "errors": errors[:3]})
    return rows


async def _load(
    target: Target, first: Request, sent: list[Request], **rest: Any
) -> tuple[list[Answer], list[str], float]:
    """`run`, after one request that nobody counts."""
    try:
        await ask(target, dataclasses.replace(first, num_tokens=2))
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{target.model}: the first request failed ({error}); see --plain, --model and --key.") from (
            error
        )
    return await run(target, sent, **rest)


def _check(given: argparse.Namespace) -> None:
    check(bool(given.url) != bool(given.config), "give either --url URL or --config CONFIG.")
    least = {"rounds": 1, "requests": 1, "prefix_tokens": 0, "vocab_size": 1, "rate": 1e-9}
    for name, value in least.items():
        found = getattr(given, name)
        check(found is None or found >= value, f"--{name.replace('_', '-')} {found} must be at least {value}.")
    check(min(given.concurrency) > 0, f"--concurrency {min(given.concurrency)} must be at least 1.")
    check(given.lengths is None or min(given.lengths) > 0, f"--lengths {given.lengths} must be at least 1.")


def _print_tables(result: dict[str, Any]) -> None:
    console = rich.console.Console()
    if "lines" in result:
        lines = [goals.Line(**line) for line in result["lines"]]
        console.print(goals.table(f"{result['config']}, float32, best of {result['rounds']} rounds", lines))
        console.print(f"{result['device']}, {result['cores']} cores, commit {result['commit']}, {result['versions']}")
    table = rich.table.Table(title=f"load on {result.get('url', 'our server')} (ms: mean, median, p99)")
    for column in ("clients", "requests", "failed", "tokens/s", "TTFT", "TPOT", "ITL", "E2EL", "good"):
        table.add_column(column, justify="right")
    for row in result["load"]:
        latencies = [
            ", ".join(f"{row[f'{kind}_{name}_ms']:.0f}" for kind in ("mean", "median", "p99"))
            if f"mean_{name}_ms" in row
            else ""
            for name in MEASURES
        ]
        good = f"{100 * row['good_share']:.0f} %" if "good_share" in row else ""
        counts = (row["concurrency"], row["completed"], row["failed"], f"{row['output_throughput']:.1f}")
        table.add_row(*map(str, counts), *latencies, good)
    console.print(table)
    for error in sorted({error for row in result["load"] for error in row["errors"]}):
        console.print(f"failed: {error}", markup=False)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsv3_jax.bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, "--config", required=False)
    parser.add_argument("--url", help="of any OpenAI-compatible server, with its /v1")
    parser.add_argument("--model", help="which of the server's; default: the first that it lists")
    parser.add_argument("--key", help="the server's API key")
    parser.add_argument("--plain", action="store_true", help="prompts of words and OpenAI's own fields alone")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16], help="clients at once")
    parser.add_argument("--rate", type=float, help="requests a second; default: as fast as the clients can")
    parser.add_argument("--requests", type=int, help="of each concurrency; default 4 a client, at least 16")
    parser.add_argument("--prefix-tokens", type=int, default=0, help="that all prompts begin with")
    parser.add_argument("--lengths", type=int, nargs=2, metavar=("PROMPT", "ANSWER"), help="instead of ShareGPT's")
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts at a URL are of ids below this")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")
    for name in MEASURES:
        parser.add_argument(f"--goal-{name}", type=float, metavar="MS", help=f"most {name} of a good request")
    parser.add_argument("--rounds", type=int, default=3, help="of programs that take turns; the best counts")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that serves the same weights in turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw throughput and latencies over concurrency")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_with_servers(main)
