"""CPU time of loading or saving an official folder, against the `safetensors` library on the same tensors.

    python -m dsv3_jax.bench.load FOLDER [FOLDER ...] [--dtype bfloat16]    # a table; --json for one object

All take turns in one process, after one turn each that brings the files into the page cache. Loading: the library reads
NumPy arrays as they are stored, which is the first peer, or converts them with `astype` too, the second;
`load_pretrained` also transposes and checks. Saving: the peers are the library reading what was saved, or saving
arrays that lie in the official order; `save_pretrained` also transposes and waits for the disk. Needs the `dev` extra.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from dsv3_jax.bench.machine import describe, peak_memory_gib
from dsv3_jax.bench.timing import median_ratio, timed
from dsv3_jax.config.check import UserError, check
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.interop.save import save_pretrained

EXIT_USER_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    try:
        check(given.rounds > 0, f"--rounds {given.rounds} must be at least 1.")
        rows = [
            measured(Path(folder), dtype, rounds=given.rounds)
            for folder in given.folders
            for dtype in given.dtype
            for measured in (measure_loading, measure_saving)
        ]
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


def measure_loading(folder: Path, dtype: str, *, rounds: int = 5) -> dict[str, Any]:
    """One row of what `--json` prints, as `_row` describes it; the peers are "read" and "convert".

    Raises: `UserError` for a folder that cannot be loaded, or without the `safetensors` library.
    """
    read = plain_reader(folder)
    programs = {
        "ours": lambda: load_pretrained(folder, dtype),
        "read": read,
        "convert": lambda: _converted(read(), dtype),
    }
    return _row(folder, f"load as {dtype}", _size(folder), programs, rounds)


def measure_saving(folder: Path, dtype: str, *, rounds: int = 5) -> dict[str, Any]:
    """The same for saving what `folder` holds in `dtype`; the peers are "read" and "save".

    Raises: as `measure_loading`.
    """
    tensors = _converted(plain_reader(folder)(), dtype)
    library: Any = importlib.import_module("safetensors.numpy")
    cfg, variables = load_pretrained(folder, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        written, ours, theirs = (Path(scratch, name) for name in ("written", "ours", "theirs"))
        save_pretrained(written, cfg, variables, dtype)
        programs = {
            "ours": lambda: save_pretrained(ours, cfg, variables, dtype),
            "read": plain_reader(written),
            "save": lambda: library.save_file(tensors, theirs),
        }

        def clean() -> None:
            shutil.rmtree(ours, ignore_errors=True)
            theirs.unlink(missing_ok=True)

        return _row(folder, f"save as {dtype}", _size(written), programs, rounds, clean)


def _row(
    folder: Path,
    work: str,
    num_bytes: int,
    programs: dict[str, Callable[[], Any]],
    rounds: int,
    clean: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Medians over `rounds` of each program's CPU seconds (user and system, all threads) and wall seconds.

    `ratio` has for each peer the median over rounds of our CPU seconds by its own. `clean` is called, not timed, after
    each turn.
    """
    cpu: dict[str, list[float]] = {name: [] for name in programs}
    wall: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            before = _cpu_seconds()
            seconds = timed(program)
            if number > 0:
                cpu[name].append(_cpu_seconds() - before)
                wall[name].append(seconds)
            clean()
            gc.collect()
    return {
        "folder": folder.name,
        "work": work,
        "file_bytes": num_bytes,
        "cpu_s": {name: statistics.median(seconds) for name, seconds in cpu.items()},
        "wall_s": {name: statistics.median(seconds) for name, seconds in wall.items()},
        "ratio": {name: median_ratio(cpu["ours"], seconds) for name, seconds in cpu.items() if name != "ours"},
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


def _converted(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {name: tensor.astype(dtype, copy=False) for name, tensor in tensors.items()}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _print_table(result: dict[str, Any]) -> None:
    table = rich.table.Table(
        title="CPU seconds per GB of file (wall seconds), and how many times the library's they are"
    )
    for column in ("folder", "work"):
        table.add_column(column)
    for column in ("GB", "ours", "reading", "times", "reading + astype, or save_file", "times"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        size = row["file_bytes"] / 1e9
        shown = {name: f"{row['cpu_s'][name] / size:.2f} ({row['wall_s'][name] / size:.2f})" for name in row["cpu_s"]}
        cells = [shown["ours"]]
        for peer, ratio in row["ratio"].items():
            cells += [shown[peer], f"{ratio:.2f}"]
        table.add_row(row["folder"], row["work"], f"{size:.2f}", *cells)
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(
        f"median of {result['rounds']} rounds · peak memory {result['peak_memory_gib']:.2f} GiB\n"
        f"{result['device']}, {result['cores']} cores · {versions} · commit {result['commit']}",
        highlight=False,
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.load", description="CPU time of loading or saving a folder."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder in the official format")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each; the median counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
