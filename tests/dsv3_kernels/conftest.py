"""Kernels in Pallas' interpreter of a GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, repository: Path) -> Callable[..., str]:
    """interpreted(*arguments, timeout=280): the output of `interpreted.py` beside the test, which must succeed.

    A program of its own, because a failed callback of the interpreter can wait for ever.
    """

    def run(*arguments: str, timeout: float = 280) -> str:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repository / "kernels")}
        environment.pop("XLA_FLAGS", None)  # one device is enough
        result = subprocess.run(
            [sys.executable, str(request.path.with_name("interpreted.py")), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run
