"""Compiles every kernel with every tuned tile for sm_90a, prints what each costs, and fails on what is wrong.

`python -m dsv3_kernels.aot` in an environment with the CUDA plugin of jax and pip's ptxas and nvdisasm, which
`make test-aot` makes; no GPU. Exit status: 0 all is well (or jax is too old for Pallas: it prints that), 1 a kernel is
wrong or the table lacks a case, 2 the check itself cannot work.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from dsv3_kernels import dispatch
from dsv3_kernels.aot import case, compile, judge, report, selfcheck
from dsv3_kernels.aot.jobs import Compiled, compile_all

TABLE = Path(__file__).parents[2] / "results" / "compiled_sm90a.md"


class Result(NamedTuple):
    """A case after its compilation; no cost where it did not compile."""

    case: case.AotCase
    cost: judge.Cost | None
    faults: list[str]


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    options = _parse(arguments)
    if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
        print(f"skipped: {dispatch.why_no_pallas()}")
        return 0
    try:
        cases = [each for each in case.collect() if options.only in each.name]
    except ValueError as error:
        return _give_up(str(error))
    if options.list:
        print("\n".join(each.name for each in cases))
        return 0
    if not cases:
        return _give_up(f"no case has {options.only!r} in its name; --list names them")
    if obstacle := _obstacle(options.jobs):
        return _give_up(obstacle)
    start = time.monotonic()
    results = _judge_all(cases, options.jobs)
    failed = [each for each in results if each.faults]
    table = report.table((each.case.name, each.cost) for each in results if each.cost is not None)
    print(f"\n{table}\n")
    for each in failed:
        print(f"FAILED {each.case.name}: {'; '.join(each.faults)}")
    minutes = (time.monotonic() - start) / 60
    print(f"compiled for sm_90a in {minutes:.1f} min: {len(results) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else _publish(table, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsv3_kernels.aot", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilations at a time")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", action="store_true", help=f"write the table into {TABLE.parent.name}/{TABLE.name}")
    where.add_argument("--check", action="store_true", help="fail if that table has other cases or columns")
    options = parser.parse_args(arguments)
    if options.only and (options.write or options.check):
        parser.error("--write and --check are about all cases; leave --only away")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} compiles nothing; give 1 or more")
    return options


def _obstacle(jobs: int) -> str | None:
    """Why the check cannot work: it must refuse the bad kernels of the self-check, each for its reason."""
    dumps = {}
    for done in compile_all(selfcheck.aot_cases(), jobs):
        if done.error:
            return (
                f"the kernel {done.case.name} was not compiled: {done.error}. It needs the CUDA plugin of jax, pip's "
                "nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-nvdisasm: make test-aot installs them."
            )
        dumps[done.case.name] = done.dump
    try:
        surprises = selfcheck.surprises(dumps)
    except ValueError as error:
        return str(error)
    if surprises:
        return "; ".join(surprises)
    refused = len(selfcheck.REFUSED) + len(selfcheck.ALTERED)
    print(f"self-check: a good kernel passes, {refused} bad ones are refused, each for its reason", flush=True)
    return None


def _judge_all(cases: list[case.AotCase], jobs: int) -> list[Result]:
    """The results in the order of `cases`, with a line of progress for each as it comes."""
    results: dict[str, Result] = {}
    for number, done in enumerate(compile_all(cases, jobs), 1):
        result = _judge(done)
        results[done.case.name] = result
        verdict = "FAILED" if result.faults else "good"
        line = f"[{number}/{len(cases)}] {verdict:6} {done.seconds:5.1f} s  {done.case.name}"
        print(f"{line}: {done.dump[compile.MEMORY]}" if done.dump else line, flush=True)
    return [results[each.name] for each in cases]


def _judge(done: Compiled) -> Result:
    if done.error:
        return Result(done.case, None, [done.error])
    try:
        cost = judge.read_cost(done.case, done.dump)
        return Result(done.case, cost, judge.find_faults(done.case, cost, done.dump))
    except ValueError as error:
        return Result(done.case, None, [str(error)])


def _publish(table: str, options: argparse.Namespace) -> int:
    """Writes or compares the table, as the options say; returns the exit status."""
    name = f"{TABLE.parent.name}/{TABLE.name}"
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    if options.write:
        TABLE.write_text(report.insert(text, table), encoding="utf-8")
        print(f"wrote the table into {name}")
    if options.check and (found := report.differences(text, table)):
        print(f"{name} is out of date: {'; '.join(found)}. Run make test-aot ARGS=--write")
        return 1
    return 0


def _give_up(reason: str) -> int:
    print(f"python -m dsv3_kernels.aot: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
