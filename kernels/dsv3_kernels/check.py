"""Every kernel on this GPU against its plain implementations, on fresh random inputs: `python -m dsv3_kernels.check`.

    python -m dsv3_kernels.check --isolate --small --out check.jsonl   the first command on a new GPU: minutes
    python -m dsv3_kernels.check --isolate --out check.jsonl --resume  then all cases that have not passed yet
    python -m dsv3_kernels.check fp8_gemm --only m64_ --seed 7         some of one op, inputs as in an earlier run
    python -m dsv3_kernels.check --implementation xla --small          what any machine can run
    python -m dsv3_kernels.check --cases my.module                     cases of your own kernels (`gpu/case.py`)

Each case runs on two sets of inputs, twice on each, into buffers filled with NaN: what a kernel leaves unwritten
fails, and so do two runs that differ in a bit (a race). One case of each way that only a device can try (operands in
registers, multicast, ...) comes first and is named; then the ops take turns, small cases before large ones.

With --isolate the cases run in a process that is watched: one that gives no verdict within --limit seconds is "hung",
one that ends the process or breaks the device is "crashed"; the process is killed, and a new one goes on with the next
case. Without it a kernel that hangs ends everything.

--out appends a JSON object for each case to a file as soon as there is a verdict: op, name, verdict (passed, failed,
refused, hung, crashed), the errors, the reasons, what it ran on. With --resume, cases that passed there before are left
out, where the sources, the device, the version of jax and the implementation are the same.

A kernel that refuses a case has failed it: `--implementation pallas` leaves out cases for the plain ones alone.

Exit status: 0 if every case was reached and passed (now, or before with --resume), 1 if not, 2 for a user error, 3 if
nothing was run because there is no Hopper GPU and `--implementation` names kernels.
"""

import argparse
import contextlib
import importlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import CheckCase, check_cases
from dsv3_kernels.gpu.checking import CRASHED, HUNG, PASSED, VERDICTS, XLA_FLAGS, Verdict, check, from_data, obstacle
from dsv3_kernels.gpu.isolate import Lost, StartError, answers
from dsv3_kernels.gpu.journal import passed_before, recorder

EXIT_NOT_PASSED, EXIT_USER_ERROR, EXIT_NOTHING_RUN = 1, 2, 3

Judge = Callable[[Iterable[CheckCase]], Iterator[Verdict]]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, which the top of this file defines."""
    given = _parse(arguments)
    with contextlib.ExitStack() as stack:
        try:
            cases = _selected(given)
            about, judge = stack.enter_context(_isolated(given) if given.isolate else _here(given))
        except (ValueError, ImportError, StartError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        if about["obstacle"]:
            print(about["obstacle"])
            return EXIT_NOTHING_RUN
        return _run(given, cases, about, judge, stack)


def _run(
    given: argparse.Namespace,
    cases: Sequence[CheckCase],
    about: Mapping[str, Any],
    judge: Judge,
    stack: contextlib.ExitStack,
) -> int:
    run = {name: about[name] for name in ("device", "jax", "commit")} | {
        "implementation": given.implementation,
        "source": machine.source_digest([given.cases] if given.cases else []),
    }
    try:
        before = passed_before(given.out, run) if given.resume else set()
        record = stack.enter_context(recorder(given.out, run | {"seed": given.seed}))
    except OSError as error:
        print(f"error: --out {given.out} cannot be written ({error.strerror}); name another file.", file=sys.stderr)
        return EXIT_USER_ERROR
    left = [case for case in cases if (case.op, case.name) not in before]
    print(
        f"{about['device']}, jax {about['jax']}, implementation {given.implementation}, seed {given.seed}, "
        f"{len(left)} cases",
        flush=True,
    )
    started = time.monotonic()
    verdicts = _verdicts(left, judge, record, given.seconds)
    not_reached = len(left) - len(verdicts)
    bad = [verdict for verdict in verdicts if verdict.verdict != PASSED]
    for verdict in bad:
        options = f"--only '{verdict.name}' --implementation {given.implementation} --seed {given.seed}"
        options += " --isolate" * given.isolate
        print(f"  {verdict.verdict}; again: python -m dsv3_kernels.check {verdict.op} {options}")
    if not_reached:
        print("  Not reached in time: give more --seconds" + (", or go on with --resume." if given.out else "."))
    counts = Counter(verdict.verdict for verdict in verdicts)
    told = [f"{counts[word]} {word}" for word in VERDICTS] + [f"{not_reached} not reached"]
    told += [f"{len(cases) - len(left)} passed before"] * given.resume
    print(f"{', '.join(told)} in {time.monotonic() - started:.0f} s")
    return EXIT_NOT_PASSED if bad or not_reached else 0


def _verdicts(
    cases: Sequence[CheckCase], judge: Judge, record: Callable[[Verdict], None], seconds: float
) -> list[Verdict]:
    """Verdicts until the time is up, each printed with how many there are and how long the others may take."""
    started = time.monotonic()
    verdicts: list[Verdict] = []

    def in_time() -> Iterator[CheckCase]:
        for case in cases:
            if time.monotonic() - started > seconds:
                return
            yield case

    try:
        for verdict in judge(in_time()):
            verdicts.append(verdict)
            record(verdict)
            left = (time.monotonic() - started) / len(verdicts) * (len(cases) - len(verdicts))
            ahead = f"{len(verdicts)}/{len(cases)}, {left // 60:.0f}:{left % 60:02.0f} left"
            print(f"{ahead:20}{verdict.line()}", flush=True)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
    return verdicts


@contextlib.contextmanager
def _here(given: argparse.Namespace) -> Iterator[tuple[Mapping[str, Any], Judge]]:
    """What this process runs on, and a function that runs cases in it."""
    machine.prepare(XLA_FLAGS)
    about = machine.describe() | {"obstacle": obstacle(given.implementation)}
    yield about, lambda cases: (check(case, given.implementation, given.seed) for case in cases)


@contextlib.contextmanager
def _isolated(given: argparse.Namespace) -> Iterator[tuple[Mapping[str, Any], Judge]]:
    """The same of a process that is watched and replaced; this one never touches the device."""
    asked: list[CheckCase] = []
    queue: list[Iterator[CheckCase]] = []

    def requests() -> Iterator[dict[str, Any]]:
        for case in queue.pop():
            asked.append(case)
            yield {"op": case.op, "name": case.name}

    def tell(seconds: float) -> None:
        print(f"    {asked[-1].op} {asked[-1].name}: {seconds:.0f} of {given.limit:.0f} s", file=sys.stderr, flush=True)

    said = answers(
        [
            *(sys.executable, "-m", "dsv3_kernels.gpu.check_worker"),
            json.dumps({"implementation": given.implementation, "seed": given.seed, "module": given.cases}),
        ],
        requests(),
        limit=given.limit,
        is_last=lambda answer: answer["verdict"] == CRASHED,
        tell=tell,
    )

    def judge(cases: Iterable[CheckCase]) -> Iterator[Verdict]:
        queue.append(iter(cases))
        for answer in said:
            case = asked[-1]
            if isinstance(answer, Lost):
                word, took = (HUNG, given.limit) if answer.has_hung else (CRASHED, 0.0)
                yield Verdict(
                    case.op, case.name, word, case.path, reasons=(answer.reason,), stderr=answer.stderr, seconds=took
                )
            else:
                yield from_data(answer)

    with contextlib.closing(said):
        about = next(said)
        assert not isinstance(about, Lost)
        yield about, judge


def _selected(given: argparse.Namespace) -> list[CheckCase]:
    """The cases that the command line names. Raises ValueError where there are none, ImportError for no such module."""
    if given.resume and not given.out:
        raise ValueError("--resume needs the file of the run to go on with; add --out FILE.")
    if given.cases:
        importlib.import_module(given.cases)
    cases = [
        case
        for case in check_cases(given.ops, given.cases)
        if (case.is_small or not given.small)
        and given.only in case.name
        and not (case.is_plain and given.implementation == "pallas")
    ]
    if not cases:
        raise ValueError("no case is left of those asked for; leave out --only, --small or the name of an op.")
    return cases


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_kernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--small", action="store_true", help="only cases that a CPU can afford")
    parser.add_argument(
        "--implementation", default="pallas", choices=("pallas", "xla", "reference"), help="default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; fresh by default")
    parser.add_argument("--isolate", action="store_true", help="go on after a case that hangs or crashes")
    parser.add_argument(
        "--limit", type=float, default=60, metavar="S", help="seconds of a case with --isolate (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, metavar="S", help="start no case after this time (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append verdicts to this file, a JSON object a line")
    parser.add_argument("--resume", action="store_true", help="leave out what passed before, according to --out FILE")
    parser.add_argument("--cases", default="", metavar="MODULE", help="check_cases() of this module, not of our ops")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the process is ended, too
    sys.exit(main())
