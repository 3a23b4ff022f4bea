"""Checks the cases that it is asked for, in a process that `gpu/isolate.py` watches.

`python -m dsv3_kernels.gpu.check_worker '{"implementation": ..., "seed": ..., "module": ...}'` prints what it runs on,
then answers {"op": ..., "name": ...} with a verdict; both as `dsv3_kernels.check` has them.
"""

import json
import sys
from typing import Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import check_cases
from dsv3_kernels.gpu.checking import XLA_FLAGS, check, obstacle
from dsv3_kernels.gpu.isolate import standard_output


def main() -> None:
    """Serves until its standard input ends."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    tell = standard_output()
    machine.prepare(XLA_FLAGS)
    cases = {(case.op, case.name): case for case in check_cases(module=given["module"])}
    tell(machine.describe() | {"obstacle": obstacle(given["implementation"])})
    for line in sys.stdin:
        request = json.loads(line)
        case = cases[request["op"], request["name"]]
        tell(check(case, given["implementation"], given["seed"]).as_data())


if __name__ == "__main__":
    main()
