"""Checks the cases that it is asked for, in a process that `gpu/isolate.py` watches.

`python -m dsv3_kernels.gpu.check_worker '{"form": ..., "seed": ..., "module": ...}'` says what it runs on, then answers
{"op": ..., "name": ...} with a verdict; both as `dsv3_kernels.check` has them.
"""

import json
import os
import sys
from typing import IO, Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import check_cases
from dsv3_kernels.gpu.checking import XLA_FLAGS, check, obstacle


def main() -> None:
    """Serves until its standard input ends."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    answers = _standard_output()
    machine.prepare(XLA_FLAGS)
    cases = {(case.op, case.name): case for case in check_cases(module=given["module"])}
    _write(answers, machine.describe() | {"obstacle": obstacle(given["form"])})
    for line in sys.stdin:
        request = json.loads(line)
        case = cases[request["op"], request["name"]]
        _write(answers, check(case, given["form"], given["seed"]).as_data())


def _standard_output() -> IO[str]:
    """The pipe for answers; what anybody else prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _write(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
