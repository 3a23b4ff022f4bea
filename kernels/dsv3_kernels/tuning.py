"""The tile of each shape, from a table for this GPU, or from a model of an H100 for shapes that the table lacks.

`python -m dsv3_kernels.tuning` times the model's best candidates on this machine's GPU, refuses those whose product is
wrong, and writes the tables of that GPU with what it measured; `--model` writes what the model says into those of
H100, without a GPU. Every row states which of both it is. A GPU without tables of its own uses those of H100.
"""

import argparse
import dataclasses
import functools
import importlib.resources
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.timing import seconds_per_launch, usable_clock
from dsv3_kernels.sm90 import model, trial
from dsv3_kernels.sm90.model import Problem
from dsv3_kernels.sm90.tile import Tile, output_slots

FOLDER, H100 = "tuned", "h100_sxm"
FOLDERS = {"NVIDIA H100 80GB HBM3": H100}
"""Tables of a device, in a folder of its name where none is given here."""
SAMPLES = 5
DENSE, CONTIGUOUS, MASKED, CONTRACTION = "dense", "contiguous", "masked", "contraction"
FILES = {DENSE: "fp8_gemm", CONTIGUOUS: "grouped_fp8_gemm", MASKED: "grouped_fp8_gemm", CONTRACTION: "grouped_fp8_gemm"}
"""Kinds of product, and the table each is in."""


def num_sms() -> int:
    """Thread blocks that run at once on this process's GPU; those of an H100 SXM where there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else model.SMS


def dense(m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike, is_b_scaled_by_row: bool) -> Problem:
    """One product."""
    return Problem(m, n, k, 1, jnp.dtype(out_dtype).name, is_b_scaled_by_row)


def contiguous(m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike) -> Problem:
    """m rows in blocks of 128, each with weights of its own."""
    return Problem(m, n, k, 1, jnp.dtype(out_dtype).name, max_block_m=128)


def masked(groups: int, m: int, n: int, k: int, *, out_dtype: jax.typing.DTypeLike) -> Problem:
    """Up to m rows a group. How many is known to the GPU only, and its loops over groups take registers: 176 spill."""
    return Problem(m, n, k, groups, jnp.dtype(out_dtype).name, max_block_m=128, max_block_n=160)


def contraction(groups: int, m: int, n: int, k: int) -> Problem:
    """A float32 sum a group, over its share of k, here taken as equal."""
    return Problem(m, n, max(k // groups, 128) // 128 * 128, groups, "float32", True)


def choose(kind: str, problem: Problem) -> Tile:
    """The tile of the table's row for this problem, or for one with as many rows in units of 64; else the model's."""
    key = _key(problem)
    for row in table(kind):
        if row["kind"] == kind and row["problem"] == key:
            tile = Tile(**row["tile"])
            if _fits(problem, tile):
                return tile
    return model.best_tile(problem)


def table(kind: str) -> list[dict[str, Any]]:
    """Rows of the kind's table, of this process's GPU if it has one, else of H100."""
    return _read(FILES[kind], device_folder())


def device_folder() -> str:
    """The name of the folder of tables for this process's GPU; H100's where there is no GPU."""
    device = jax.devices()[0]
    return FOLDERS.get(device.device_kind, machine.file_stem(device.device_kind)) if device.platform == "gpu" else H100


@functools.cache
def _read(name: str, folder: str) -> list[dict[str, Any]]:
    tables = importlib.resources.files("dsv3_kernels").joinpath(FOLDER)
    own = tables.joinpath(folder, f"{name}.json")
    path = own if own.is_file() else tables.joinpath(H100, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def tuned_tiles(kind: str) -> list[tuple[Problem, Tile]]:
    """Each tile of the table once, with the first problem it is for."""
    found: dict[tuple[Tile, bool], Problem] = {}
    for row in table(kind):
        if row["kind"] == kind:
            problem = Problem(**row["problem"])
            found.setdefault((Tile(**row["tile"]), problem.is_b_scaled_by_row), problem)
    return [(problem, tile) for (tile, _), problem in found.items()]


def problems() -> Iterator[tuple[str, Problem]]:
    """The problems of all cases of the model's shapes, once each."""
    from dsv3_kernels.gemm import cases as gemm
    from dsv3_kernels.grouped_gemm import cases as grouped

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
    yield from dict.fromkeys((kind, _rounded(problem)) for kind, problem in all_problems)


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="write what the model says, and measure nothing")
    parser.add_argument(
        "--candidates", type=int, default=6, help="how many of the model's best tiles to time (default %(default)s)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only kinds whose name holds TEXT; keeps other rows")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if not options.model and device.platform != "gpu":
        print(f"{machine.no_gpu('python -m dsv3_kernels.tuning')} --model writes the modelled tables.")
        return 0
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(set(FILES.values()))}
    seconds = None if options.model else _clock()
    for kind, problem in problems():
        if options.only not in kind:
            rows[FILES[kind]] += [row for row in table(kind) if row["kind"] == kind and row["problem"] == _key(problem)]
        elif seconds is None:
            tile = model.best_tile(problem)
            rows[FILES[kind]].append(_row(kind, problem, tile, model.seconds(problem, tile), "modelled"))
        else:
            tile, best = trial.fastest(
                trial.make_trial(kind, problem), model.candidates(problem)[: options.candidates], seconds
            )
            rows[FILES[kind]].append(_row(kind, problem, tile, best, f"measured on {device.device_kind}"))
            print(f"{kind:<12} {_key(problem)}  {tile.name:<24} {best * 1e6:9.1f} us", flush=True)
    folder = H100 if options.model else device_folder()
    for name, kept in rows.items():
        _write(Path(__file__).parent / FOLDER / folder / f"{name}.json", kept)
    return 0


def _clock() -> trial.Seconds:
    """The bench's clock."""
    clock, obstacle = usable_clock()
    print(f"clock: {clock}" + (f" ({obstacle})" if obstacle else ""))
    return lambda function, sets: seconds_per_launch(function, sets, clock=clock, samples=SAMPLES)[0]


def _fits(problem: Problem, tile: Tile) -> bool:
    """Whether the tile has room for a chunk of this output, which may be wider than the one it was tuned for."""
    dtype = jnp.float32 if tile.split_k > 1 else problem.out_dtype
    return output_slots(tile, dtype, is_b_scaled_by_row=problem.is_b_scaled_by_row) > 0


def _rounded(problem: Problem) -> Problem:
    """The problem that stands for it in a table: rows in full units of 64, those of one group's k in 1024."""
    k = -(-problem.k // 1024) * 1024 if problem.out_dtype == "float32" and problem.groups > 1 else problem.k
    return problem._replace(m=-(-problem.m // 64) * 64, k=k)


def _key(problem: Problem) -> dict[str, Any]:
    return _rounded(problem)._asdict()


def _row(kind: str, problem: Problem, tile: Tile, seconds: float, source: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "problem": _key(problem),
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
