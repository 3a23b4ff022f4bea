"""Speed of every kernel on this GPU, beside XLA, cuBLASLt, torch and tokamax in the same run.

    python -m dsv3_kernels.bench                      all ops, at most seven minutes; writes kernels/results/
    python -m dsv3_kernels.bench --resume             goes on with what that did not reach, until all rows are there
    python -m dsv3_kernels.bench fp8_gemm --quick     one op, few rows
    python -m dsv3_kernels.bench --json speed.json    the data into one more file
    python -m dsv3_kernels.bench --torch PYTHON       torch of another environment; tokamax: pip install tokamax

There are more rows than minutes: ops take turns, and what others published figures for comes first, so that a run that
is cut short has rows of every op. The files are rewritten after each row; --resume takes from them what the same
sources measured on this device (the ceilings, and torch's times, are measured again). Rows are measured in a process
that is watched: one that gives no times within --limit seconds, or ends the process, costs that row only.

A row gives its time, that of its longest kernel alone (what is beside it are casts, scales, plans), the goal and how
near it is. The goal of what memory binds is its bytes at the measured copy rate and 3 µs; of what matmuls bind a share
of their measured rate, or the published one (`gpu/report.py`).

Without a GPU it says so and exits 0. How a launch is timed is written in `gpu/timing.py`; the rows are offered by the
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
NOT_REACHED = "not reached"
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
    rows: list[Row] = []  # as of before, and to be filled
    requests = asked_for(rows, lambda: seconds_left() > 0)
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
            about["source"] = machine.source_digest()
            before = measured_before(_stem(about), about) if given.resume else {}
            rows += [
                from_answer(case, before[case.op, case.name]) if (case.op, case.name) in before else unmeasured(case)
                for case in cases
            ]
            _measure(given, rows, said, about, ceilings)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    request = functools.partial(run_peer, given.torch, seconds=max(0.0, seconds_left()) + TORCH_SECONDS)
    rows, about["torch"] = with_torch(rows, request, about["clock"])
    print(markdown(about, ceilings, rows))
    for path in _save(given, about, ceilings, rows):
        print(f"Written to {path}")
    return 0


def unmeasured(case: BenchCase, why: str = NOT_REACHED) -> Row:
    """A row without times."""
    return Row(case, None, {}, (why,))


def asked_for(rows: Sequence[Row], has_time: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The ceilings, then the rows that are not measured, until the time is up; `rows` may grow after the ceilings."""
    yield {"ceilings": True}
    for case in [row.case for row in rows if row.notes == (NOT_REACHED,)]:
        if not has_time():
            return
        yield {"op": case.op, "name": case.name}


def measured_before(stem: Path, about: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Times of the kernels that the same sources measured on the same device, by op and name."""
    path = stem.with_suffix(".json")
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}}
    if any(data["machine"].get(name) != about[name] for name in ("source", "device", "jax")):
        return {}
    return {(row["op"], row["name"]): row["seconds"] for row in data["rows"] if row["seconds"]["kernel"] is not None}


def _measure(
    given: argparse.Namespace,
    rows: list[Row],
    said: Iterator[dict[str, Any] | Lost],
    about: Mapping[str, Any],
    ceilings: Ceilings,
) -> None:
    """Fills in each row as it is measured, printed and saved."""
    started = time.monotonic()
    places = [place for place, row in enumerate(rows) if row.notes == (NOT_REACHED,)]
    try:
        for index, (place, answer) in enumerate(zip(places, said)):
            case = rows[place].case
            lost = isinstance(answer, Lost)
            rows[place] = row = unmeasured(case, f"lost: {answer.reason}") if lost else from_answer(case, answer)
            left = (time.monotonic() - started) / (index + 1) * (len(places) - index - 1)
            took = "; ".join(row.notes)
            if row.kernel is not None:
                took = f"{row.kernel * 1e6:.1f} µs, {goal_seconds(case, ceilings) / row.kernel:.0%} of its goal"
            ahead = f"{index + 1}/{len(places)}, {left // 60:.0f}:{left % 60:02.0f} left"
            print(f"{ahead:20}{case.op:26}{case.name:44}{took}", flush=True)
            _save(given, about, ceilings, rows)
    except StartError as error:  # no process any more: what there is will do
        print(f"error: {error}", file=sys.stderr)


def _stem(about: Mapping[str, Any]) -> Path:
    """Of the files of this device."""
    return machine.results_folder() / machine.file_stem(about["device"])


def _save(given: argparse.Namespace, about: Mapping[str, Any], ceilings: Ceilings, rows: Sequence[Row]) -> list[Path]:
    """Writes the page and the data, each whole or not at all, and returns where."""
    data = {"machine": about, "ceilings": ceilings._asdict(), "rows": [as_data(row, ceilings) for row in rows]}
    texts = {Path(given.json): json.dumps(data, indent=1) + "\n"} if given.json else {}
    if not given.quick and not given.ops:
        stem = _stem(about)
        stem.parent.mkdir(exist_ok=True)
        texts[stem.with_suffix(".json")] = json.dumps(data, indent=1) + "\n"
        texts[stem.with_suffix(".md")] = markdown(about, ceilings, rows)
    for path, text in texts.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
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
    parser.add_argument("--resume", action="store_true", help="measure what the files of this device do not have yet")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="an interpreter that has torch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the process is ended, too
    sys.exit(main())
