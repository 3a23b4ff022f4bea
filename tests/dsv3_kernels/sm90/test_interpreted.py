"""The FP8 GEMM kernels give what the reference gives, without a race, in Pallas's interpreter of a GPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsv3_kernels import dispatch

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

PROGRAM = Path(__file__).with_name("interpreted.py")
ROOT = Path(__file__).parents[3]


def _load():
    spec = importlib.util.spec_from_file_location("interpreted", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = list(_load().CASES)
NUM_FAST = _load().NUM_FAST


def _check(names: list[str], timeout: float) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("XLA_FLAGS", None)
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *names],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [report["name"] for report in reports] == names
    for report in reports:
        assert report["agree"], report
        assert math.isfinite(report["error"]), report
        assert report["error"] <= report["bound"], report
        assert not report["races"], report


def test_kernels_agree_with_the_reference():
    _check(NAMES[:NUM_FAST], timeout=240)


@pytest.mark.slow
def test_kernels_agree_with_the_reference_at_odd_sizes():
    _check(NAMES[NUM_FAST:], timeout=400)
