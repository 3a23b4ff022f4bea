"""Measures the rows that it is asked for, in a process that `gpu/isolate.py` watches.

`python -m dsv3_kernels.gpu.bench_worker SAMPLES` says what it runs on, then answers {"ceilings": true} with the rates
of this machine, and {"op": ..., "name": ...} with the times of that row.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_kernels.gpu import machine
from dsv3_kernels.gpu.case import bench_cases
from dsv3_kernels.gpu.ceilings import measure_ceilings
from dsv3_kernels.gpu.isolate import standard_output
from dsv3_kernels.gpu.measuring import as_answer, measured
from dsv3_kernels.gpu.timing import Times, seconds_per_launch, usable_clock

# Launches one after the other on one stream: inside a command buffer XLA may let independent ones overlap. Products by
# the vendor's library: XLA's search among Triton's takes seconds a shape, and loses at these sizes.
XLA_FLAGS = "--xla_gpu_enable_command_buffer= --xla_gpu_enable_triton_gemm=false"


def main() -> None:
    """Serves until its standard input ends."""
    samples, tell = int(sys.argv[1]), standard_output()
    machine.prepare(XLA_FLAGS)
    if machine.gpu() is None:
        tell({"obstacle": machine.no_gpu()})
        return
    cases = {(case.op, case.name): case for case in bench_cases()}
    clock, why = usable_clock()
    others = {"tokamax": machine.version_of("tokamax")}
    tell(machine.describe() | others | {"clock": clock, "clock_obstacle": why, "obstacle": ""})

    def timer(function: Callable[[Any], Any], sets: Sequence[Any]) -> Times:
        return seconds_per_launch(function, sets, clock=clock, samples=samples)

    for line in sys.stdin:
        request = json.loads(line)
        if "ceilings" in request:
            tell(measure_ceilings(lambda function, sets: timer(function, sets).median)._asdict())
        else:
            tell(as_answer(measured(cases[request["op"], request["name"]], timer)))


if __name__ == "__main__":
    main()
