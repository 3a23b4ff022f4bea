"""Speed of every kernel on this GPU, beside XLA, cuBLASLt and torch in the same run.

    python -m dsv3_kernels.bench                      all ops, at most seven minutes; writes kernels/results/
    python -m dsv3_kernels.bench fp8_gemm --quick     one op, few rows
    python -m dsv3_kernels.bench --json speed.json    the data into one more file

Without a GPU it says so and exits 0. How a launch is timed is told in `gpu/timing.py`; the rows are offered by the
ops (`gpu/case.py`).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import BenchCase, bench_cases
from dsv3_kernels.gpu.ceilings import measure_ceilings
from dsv3_kernels.gpu.report import Row, as_data, markdown
from dsv3_kernels.gpu.timing import num_input_sets, seconds_per_launch, usable_clock
from dsv3_kernels.gpu.torch_ask import run_peer, with_torch

EXIT_USER_ERROR = 2
SAMPLES, QUICK_SAMPLES = 7, 3
TORCH_SECONDS = 120
"""For torch, and what our rows left of theirs."""

# Launches one after the other on one stream: inside a command buffer XLA may let independent ones overlap. Products by
# the vendor's library: XLA's search among Triton's takes seconds a shape, and loses at these sizes.
XLA_FLAGS = "--xla_gpu_enable_command_buffer= --xla_gpu_enable_triton_gemm=false"

Timer = Callable[[Callable[[Any], Any], Sequence[Any]], tuple[float, float, float]]
"""A function of inputs and its sets of inputs -> median, fastest and slowest seconds of a launch."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 2 for a user's error)."""
    given = _parse(arguments)
    machine.prepare(XLA_FLAGS)
    try:
        cases = [case for case in bench_cases(given.ops) if case.is_quick or not given.quick]
        cases.sort(key=lambda case: case.published is None)  # stable; where time runs out, these matter most
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if machine.gpu() is None:
        print(machine.no_gpu())
        return 0
    started = time.monotonic()
    clock, obstacle = usable_clock()
    samples = QUICK_SAMPLES if given.quick else SAMPLES

    def timer(function: Callable[[Any], Any], sets: Sequence[Any]) -> tuple[float, float, float]:
        return seconds_per_launch(function, sets, clock=clock, samples=samples)

    about = machine.describe() | {"clock": clock + (f" ({obstacle})" if obstacle else "")}
    ceilings = measure_ceilings(lambda function, sets: timer(function, sets)[0])
    rows = run_cases(cases, timer, has_time=lambda: time.monotonic() - started < given.seconds)
    left = max(0.0, given.seconds - (time.monotonic() - started))
    rows, about["torch"] = with_torch(rows, lambda request: run_peer(given.torch, request, left + TORCH_SECONDS), clock)
    page = markdown(about, ceilings, rows)
    print(page)
    data = {
        "machine": about,
        "ceilings": ceilings._asdict(),
        "rows": [as_data(row, ceilings) for row in rows],
    }
    text = json.dumps(data, indent=1) + "\n"
    if not given.quick and not given.ops:
        folder = machine.results_folder()
        folder.mkdir(exist_ok=True)
        stem = folder / machine.file_stem(about["device"])
        stem.with_suffix(".json").write_text(text, encoding="utf-8")
        stem.with_suffix(".md").write_text(page, encoding="utf-8")
        print(f"Written to {stem}.json and {stem}.md")
    if given.json:
        Path(given.json).write_text(text, encoding="utf-8")
    return 0


def run_cases(cases: Sequence[BenchCase], timer: Timer, *, has_time: Callable[[], bool]) -> list[Row]:
    """Times the kernel of each case and the other ways; rows after the time is up say so."""
    rows = []
    for case in cases:
        if not has_time():
            rows.append(Row(case, None, {}, ("no time left",)))
            continue
        keys = jax.random.split(jax.random.key(0), num_input_sets(case.num_bytes))
        make_inputs = jax.jit(case.make_inputs)
        sets = [make_inputs(key) for key in keys]
        times, notes = _tried("kernel", case.kernel, timer, sets)
        others: dict[str, float | None] = {}
        for name, function in case.others.items():
            other, why = _tried(name, function, timer, sets)
            others[name] = other[0] if other else None
            notes += why
        rows.append(Row(case, times[0] if times else None, others, notes, times[1:] if times else None))
    return rows


def _tried(
    name: str, function: Callable[[Any], Any], timer: Timer, sets: Sequence[Any]
) -> tuple[tuple[float, float, float] | None, tuple[str, ...]]:
    """The times, or the reason why it cannot run: one way's failure must not cost the other rows."""
    try:
        return timer(function, sets), ()
    except NotImplementedError as error:
        return None, (f"{name}: {error}",)
    except jax.errors.JaxRuntimeError as error:
        return None, (f"{name} failed: {str(error).splitlines()[0]}",)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument("--json", metavar="FILE", help="write the data to this file, too")
    parser.add_argument("--quick", action="store_true", help="few rows and samples")
    parser.add_argument("--seconds", type=float, default=240, help="start no row after this time (default %(default)s)")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="an interpreter that has torch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
