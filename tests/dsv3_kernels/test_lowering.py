"""Every kernel is lowered for CUDA, without a GPU and without the plugin: layouts, shapes, shared memory."""

import jax
import pytest

from dsv3_kernels import dispatch
from dsv3_kernels.aot import case

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

CASES = case.collect()
FIRST = {each.name.split()[0]: each.name for each in reversed(CASES)}
"""One case of each op, which the fast tests lower; whole programs take longer."""


def _parameter(each: case.AotCase) -> object:
    marks = [] if each.name in FIRST.values() and each.expect is None else [pytest.mark.slow]
    return pytest.param(each, id=each.name, marks=marks)


@pytest.mark.parametrize("each", [_parameter(each) for each in CASES])
def test_lowers_for_cuda(each):
    exported = jax.export.export(jax.jit(each.function), platforms=["cuda"])(*each.args)
    assert "mosaic_gpu" in exported.mlir_module()
