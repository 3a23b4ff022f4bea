"""The grouped bf16 GEMM kernels give what the reference gives, without a race, in Pallas's interpreter of a GPU."""

import importlib.util
import json
import math
from pathlib import Path

import jax
import pytest

from dsv3_kernels import target

if jax.__version_info__ < target.OLDEST_PALLAS_JAX:
    pytest.skip("Pallas's kernels need a newer jax", allow_module_level=True)

PROGRAM = Path(__file__).with_name("interpreted.py")


def _load():
    spec = importlib.util.spec_from_file_location("interpreted_grouped_bf16", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = list(_load().CASES)
NUM_FAST = _load().NUM_FAST


@pytest.mark.slow
@pytest.mark.parametrize("names", [NAMES[:NUM_FAST], NAMES[NUM_FAST:]], ids=["first", "odd"])
def test_kernels_agree_with_the_reference(interpreted, names):
    output = interpreted(*names)
    _, *reports = map(json.loads, output.splitlines())
    assert [report["name"] for report in reports] == names
    for report in reports:
        assert report["agree"], report
        assert math.isfinite(report["error"]), report
        assert report["error"] <= report["bound"], report
        assert not report["races"], report
