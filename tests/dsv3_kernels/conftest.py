"""Kernels in Pallas' interpreter of a GPU."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dsv3_kernels.watch import run_watched


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, repository: Path) -> Callable[..., str]:
    """interpreted(*arguments): the output of `interpreted.py` beside the test, which must succeed.

    A program of its own, because a failed callback of the interpreter can wait for ever; it is ended when it stops
    advancing, not after a time.
    """

    def run(*arguments: str) -> str:
        paths = os.pathsep.join([str(repository), str(repository / "kernels")])
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
        environment.pop("XLA_FLAGS", None)  # one device is enough
        # XLA runs some callbacks on a pool of as many threads as there are cores. Those of a barrier wait there, and a
        # kernel that waits in more places at once than that would never go on.
        environment["NPROC"] = "32"
        program = str(request.path.with_name("interpreted.py"))
        result = run_watched([sys.executable, program, *arguments], env=environment)
        assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    return run
