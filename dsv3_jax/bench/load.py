"""CPU time of loading an official folder, against the `safetensors` library that reads the same files and no more.

    python -m dsv3_jax.bench.load FOLDER [FOLDER ...] [--dtype bfloat16]    # a table; --json for one object

Both take turns in one process, after one reading each that brings the files into the page cache. The plain reader
gives NumPy arrays as they are stored; `load_pretrained` also transposes, converts, dequantises and checks. Needs the
`dev` extra.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import rich.console
import rich.table

from dsv3_jax.bench.machine import describe, peak_memory_gib
from dsv3_jax.bench.timing import median_ratio, timed
from dsv3_jax.config.check import UserError, check
from dsv3_jax.interop.pretrained import load_pretrained

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    try:
        check(given.rounds > 0, f"--rounds {given.rounds} must be at least 1.")
        rows = [measure(Path(folder), dtype, rounds=given.rounds) for folder in given.folders for dtype in given.dtype]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    machine = describe(jnp.float32)
    machine["versions"]["safetensors"] = importlib.metadata.version("safetensors")
    result = {"rows": rows, "rounds": given.rounds, "peak_memory_gib": peak_memory_gib(), **machine}
    if given.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0


def measure(folder: Path, dtype: str, *, rounds: int = 5) -> dict[str, Any]:
    """One row of what `--json` prints: medians over `rounds`.

    `cpu_s` is user and system time of the process, all threads; `ratio` the median over rounds of ours by the plain
    reader's.

    Raises: `UserError` for a folder that cannot be loaded, or without the `safetensors` library.
    """
    plain = plain_reader(folder)
    programs: dict[str, Callable[[], Any]] = {"plain": plain, "ours": lambda: load_pretrained(folder, dtype)}
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    wall: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            before = _cpu_seconds()
            seconds = timed(program)
            if number > 0:
                cpu[name].append(_cpu_seconds() - before)
                wall[name].append(seconds)
            gc.collect()
    return {
        "folder": folder.name,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "dtype": dtype,
        **{f"{name}_cpu_s": statistics.median(seconds) for name, seconds in cpu.items()},
        **{f"{name}_wall_s": statistics.median(seconds) for name, seconds in wall.items()},
        "ratio": median_ratio(cpu["ours"], cpu["plain"]),
    }


def plain_reader(folder: Path) -> Callable[[], Any]:
    """Reads every tensor of a folder with the `safetensors` library."""
    try:
        library: Any = importlib.import_module("safetensors")
    except ImportError:
        raise UserError("the `safetensors` library is missing; install the `dev` extra.") from None
    files = sorted(folder.glob("*.safetensors"))
    check(bool(files), f"{folder}: has no safetensors files; give the folder of a checkpoint.")

    def read() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in files:
            with library.safe_open(file, framework="np") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.offset_keys()}
        return tensors

    return read


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _print_table(result: dict[str, Any]) -> None:
    table = rich.table.Table(title="loading: CPU seconds, wall seconds in brackets")
    table.add_column("folder")
    for column in ("GB", "loaded as", "safetensors", "load_pretrained", "times its CPU time"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["folder"],
            f"{row['file_bytes'] / 1e9:.2f}",
            row["dtype"],
            f"{row['plain_cpu_s']:.2f} ({row['plain_wall_s']:.2f})",
            f"{row['ours_cpu_s']:.2f} ({row['ours_wall_s']:.2f})",
            f"{row['ratio']:.2f}",
        )
    console = rich.console.Console()
    console.print(table)
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"median of {result['rounds']} rounds · peak memory {result['peak_memory_gib']:.2f} GiB\n"
        f"{result['device']}, {result['cores']} cores · {versions} · commit {result['commit']}",
        highlight=False,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.bench.load", description="CPU time of loading a folder.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder in the official format")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed readings of each; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
