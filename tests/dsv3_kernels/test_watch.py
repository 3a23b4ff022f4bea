"""Who waits for the interpreter's programs."""

import os
import sys

import pytest

from tests.dsv3_kernels.watch import StuckError, cpu_seconds, run_watched

SLEEP = "import time\ndef in_vain():\n    time.sleep(1000)\nin_vain()"
FAIL = "print('out'); raise SystemExit('err')"


def test_a_process_that_waits_for_ever_is_ended_with_its_stacks() -> None:
    with pytest.raises(StuckError, match="in_vain"):
        run_watched([sys.executable, "-S", "-c", SLEEP], env=os.environ, patience=3.0)


def test_what_a_failing_process_writes_is_returned() -> None:
    result = run_watched([sys.executable, "-S", "-c", FAIL], env=os.environ)
    assert (result.returncode, result.stdout, result.stderr) == (1, "out\n", "err\n")


def test_computing_counts_as_advancing() -> None:
    before = sum(os.times()[:2])
    used = cpu_seconds(os.getpid())
    assert before - 0.1 <= used <= sum(os.times()[:2]) + 0.1
