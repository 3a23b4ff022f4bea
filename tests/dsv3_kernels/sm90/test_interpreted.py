"""The FP8 GEMM kernels give what the reference gives, without a race, in Pallas's interpreter of a GPU."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from dsv3_kernels import dispatch

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

PROGRAM = Path(__file__).with_name("interpreted.py")


def _load():
    spec = importlib.util.spec_from_file_location("interpreted", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = list(_load().CASES)
NUM_FAST = _load().NUM_FAST


def _check(names: list[str], output: str) -> None:
    reports = [json.loads(line) for line in output.splitlines()]
    assert [report["name"] for report in reports] == names
    for report in reports:
        assert report["agree"], report
        assert math.isfinite(report["error"]), report
        assert report["error"] <= report["bound"], report
        assert not report["races"], report


def test_kernels_agree_with_the_reference(interpreted):
    _check(NAMES[:NUM_FAST], interpreted(*NAMES[:NUM_FAST]))


@pytest.mark.slow
def test_kernels_agree_with_the_reference_at_odd_sizes(interpreted):
    _check(NAMES[NUM_FAST:], interpreted(*NAMES[NUM_FAST:]))
