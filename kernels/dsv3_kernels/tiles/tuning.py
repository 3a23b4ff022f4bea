"""Chooses the tile of each of the model's shapes, and writes the tables that `tiles` reads.

`python -m dsv3_kernels.tuning` times the model's best candidates on this machine's GPU, refuses those whose result is
wrong, and writes the tables of that GPU with what it measured; `--model` writes what the model predicts into those of
H100, without a GPU. Every row states which of both it is.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels.gemm import cases as gemm
from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.timing import seconds_per_launch, usable_clock
from dsv3_kernels.grouped_gemm import cases as grouped
from dsv3_kernels.sm90.tile import Tile
from dsv3_kernels.tiles import model, trial
from dsv3_kernels.tiles.choice import (
    CONTIGUOUS,
    CONTRACTION,
    DENSE,
    FILES,
    FOLDER,
    H100,
    MASKED,
    contiguous,
    contraction,
    dense,
    device_folder,
    key_of,
    masked,
    rounded,
    table,
)
from dsv3_kernels.tiles.model import Problem

SAMPLES = 5


def problems() -> Iterator[tuple[str, Problem]]:
    """The problems of all cases of the model's shapes, once each."""
    all_problems = [
        *(
            (DENSE, dense(c.m, c.n, c.k, out_dtype=c.out_dtype, is_b_scaled_by_row=c.role == gemm.WEIGHT_GRADIENT))
            for c in gemm.CASES
            if not c.is_small
        ),
        *(
            (CONTIGUOUS, contiguous(c.m, c.n, c.k, out_dtype=jnp.bfloat16))
            for c in grouped.CONTIGUOUS_CASES
            if not c.is_small
        ),
        *(
            (MASKED, masked(len(c.valid), c.m, c.n, c.k, out_dtype=jnp.bfloat16))
            for c in grouped.MASKED_CASES
            if not c.is_small
        ),
        *(
            (CONTRACTION, contraction(len(c.blocks), c.m, c.n, c.k))
            for c in grouped.CONTRACTION_CASES
            if not c.is_small
        ),
    ]
    yield from dict.fromkeys((kind, rounded(problem)) for kind, problem in all_problems)


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="write what the model predicts, and measure nothing")
    parser.add_argument(
        "--candidates",
        type=int,
        default=4,
        help="how many of the best tiles to time, by each of the model's two rates of L2 (default %(default)s)",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only kinds whose name holds TEXT; leaves other rows as they are"
    )
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if not options.model and device.platform != "gpu":
        print(f"{machine.no_gpu('python -m dsv3_kernels.tuning')} --model writes the modelled tables.")
        return 0
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(set(FILES.values()))}
    seconds = None if options.model else _clock()
    for kind, problem in problems():
        if options.only not in kind:
            rows[FILES[kind]] += [
                row for row in table(kind) if row["kind"] == kind and row["problem"] == key_of(problem)
            ]
        elif seconds is None:
            tile = model.best_tile(problem)
            rows[FILES[kind]].append(_row(kind, problem, tile, model.seconds(problem, tile), "modelled"))
        else:
            tiles = model.shortlist(problem, options.candidates)
            tile, best = trial.fastest(trial.make_trial(kind, problem), tiles, seconds)
            rows[FILES[kind]].append(_row(kind, problem, tile, best, f"measured on {device.device_kind}"))
            print(f"{kind:<12} {key_of(problem)}  {tile.name:<24} {best * 1e6:9.1f} us", flush=True)
    folder = H100 if options.model else device_folder()
    for name, kept in rows.items():
        _write(Path(__file__).parent / FOLDER / folder / f"{name}.json", kept)
    return 0


def _clock() -> trial.Seconds:
    """The bench's clock."""
    clock, obstacle = usable_clock()
    print(f"clock: {clock}" + (f" ({obstacle})" if obstacle else ""))
    return lambda function, sets: seconds_per_launch(function, sets, clock=clock, samples=SAMPLES)[0]


def _row(kind: str, problem: Problem, tile: Tile, seconds: float, source: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "problem": key_of(problem),
        "tile": dataclasses.asdict(tile),
        "microseconds": round(seconds * 1e6, 1),
        "source": source,
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a change of the table can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
