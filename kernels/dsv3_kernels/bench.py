"""Speed of every kernel on this GPU, beside XLA, cuBLASLt, torch and tokamax in the same run.

    python -m dsv3_kernels.bench                      all ops, at most seven minutes; writes kernels/results/
    python -m dsv3_kernels.bench fp8_gemm --quick     one op, few rows
    python -m dsv3_kernels.bench --json speed.json    the data into one more file
    python -m dsv3_kernels.bench --torch PYTHON       torch of another environment; tokamax: pip install tokamax

Ops take turns, and what others published figures for comes first: a run that is cut short has rows of every op. The
files are written anew after each row. Rows are measured in a process that is watched: one that gives no times within
--limit seconds, or ends the process, costs that row only.

A row tells its time, that of its longest kernel alone (what is beside it are casts, scales, plans), the goal and how
near it is. The goal of what memory binds is its bytes at the measured copy rate and 3 µs; of what products bind a share
of their measured rate, or the published one (`gpu/report.py`).

Without a GPU it says so and exits 0. How a launch is timed is told in `gpu/timing.py`; the rows are offered by the
ops (`gpu/case.py`).
"""

import argparse
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import BenchCase, bench_cases
from dsv3_kernels.gpu.ceilings import Ceilings
from dsv3_kernels.gpu.isolate import Lost, StartError, answers
from dsv3_kernels.gpu.measuring import from_answer
from dsv3_kernels.gpu.report import Row, as_data, goal_seconds, markdown
from dsv3_kernels.gpu.torch_ask import run_peer, with_torch

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
SAMPLES, QUICK_SAMPLES = 7, 3
TORCH_SECONDS = 120
"""For torch, and what our rows left of theirs."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, 1 if nothing could be measured, 2 for a user's error)."""
    given = _parse(arguments)
    try:
        cases = [case for case in bench_cases(given.ops) if case.is_quick or not given.quick]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    started = time.monotonic()

    def seconds_left() -> float:
        return given.seconds - (time.monotonic() - started)

    samples = QUICK_SAMPLES if given.quick else SAMPLES
    worker = [sys.executable, "-m", "dsv3_kernels.gpu.bench_worker", str(samples)]
    requests = asked_for(cases, lambda: seconds_left() > 0)
    try:
        with contextlib.closing(answers(worker, requests, limit=given.limit)) as said:
            about = next(said)
            assert not isinstance(about, Lost)
            if obstacle := about.pop("obstacle"):
                print(obstacle)
                return 0
            rates = next(said)
            if isinstance(rates, Lost):
                raise StartError(f"the rates of this machine were not measured: {rates.reason}\n{rates.stderr}")
            ceilings = Ceilings(**rates)
            rows = _rows(given, cases, said, about, ceilings)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    request = functools.partial(run_peer, given.torch, seconds=max(0.0, seconds_left()) + TORCH_SECONDS)
    rows, about["torch"] = with_torch(rows, request, about["clock"])
    print(markdown(about, ceilings, rows))
    for path in _save(given, about, ceilings, rows):
        print(f"Written to {path}")
    return 0


def asked_for(cases: Sequence[BenchCase], has_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The ceilings, then rows until the time is up."""
    yield {"ceilings": True}
    for case in cases:
        if not has_time():
            return
        yield {"op": case.op, "name": case.name}


def row_of(case: BenchCase, answer: Mapping[str, Any] | Lost) -> Row:
    """The row of an answer, or of none."""
    return Row(case, None, {}, (f"lost: {answer.reason}",)) if isinstance(answer, Lost) else from_answer(case, answer)


def _rows(
    given: argparse.Namespace,
    cases: Sequence[BenchCase],
    said: Iterator[dict[str, Any] | Lost],
    about: Mapping[str, Any],
    ceilings: Ceilings,
) -> list[Row]:
    """Each row as it is measured, told and saved; those that were not reached say so."""
    started = time.monotonic()
    rows = [Row(case, None, {}, ("not reached",)) for case in cases]
    try:
        for index, answer in enumerate(said):
            rows[index] = row = row_of(cases[index], answer)
            left = (time.monotonic() - started) / (index + 1) * (len(cases) - index - 1)
            took = "; ".join(row.notes)
            if row.kernel is not None:
                took = f"{row.kernel * 1e6:.1f} µs, {goal_seconds(row.case, ceilings) / row.kernel:.0%} of its goal"
            ahead = f"{index + 1}/{len(cases)}, {left // 60:.0f}:{left % 60:02.0f} left"
            print(f"{ahead:20}{row.case.op:26}{row.case.name:44}{took}", flush=True)
            _save(given, about, ceilings, rows)
    except StartError as error:  # no process any more: what there is will do
        print(f"error: {error}", file=sys.stderr)
    return rows


def _save(given: argparse.Namespace, about: Mapping[str, Any], ceilings: Ceilings, rows: Sequence[Row]) -> list[Path]:
    """Writes the page and the data, and returns where."""
    data = {"machine": about, "ceilings": ceilings._asdict(), "rows": [as_data(row, ceilings) for row in rows]}
    texts = {Path(given.json): json.dumps(data, indent=1) + "\n"} if given.json else {}
    if not given.quick and not given.ops:
        folder = machine.results_folder()
        folder.mkdir(exist_ok=True)
        stem = folder / machine.file_stem(about["device"])
        texts[stem.with_suffix(".json")] = json.dumps(data, indent=1) + "\n"
        texts[stem.with_suffix(".md")] = markdown(about, ceilings, rows)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument("--json", metavar="FILE", help="write the data to this file, too")
    parser.add_argument("--quick", action="store_true", help="few rows and samples")
    parser.add_argument("--seconds", type=float, default=240, help="start no row after this time (default %(default)s)")
    parser.add_argument("--limit", type=float, default=90, help="seconds of a row (default %(default)s)")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="an interpreter that has torch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the process is ended, too
    sys.exit(main())
