"""Every kernel is lowered for CUDA, without a GPU and without the plugin: layouts, shapes, shared memory."""

import jax
import pytest

from dsv3_kernels import dispatch
from dsv3_kernels.aot import case

if jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX:
    pytest.skip(dispatch.why_no_pallas() or "", allow_module_level=True)

from dsv3_kernels.casts.pallas_rounding import CAN_STORE

CASES = case.collect()
STORING = ("cache_write", "cast_tokens", "cast_blocks", "swiglu_cast", "requantize_transposed")
FIRST = {each.name.split()[0]: each.name for each in reversed(CASES)}
"""One case of each op, which the fast tests lower."""


def _parameter(each: case.AotCase) -> object:
    marks = [] if each.name in FIRST.values() else [pytest.mark.slow]
    if each.name.startswith(STORING) and not CAN_STORE:
        marks.append(pytest.mark.skip(reason="jax older than 0.12: no stores in a layout"))
    return pytest.param(each, id=each.name, marks=marks)


@pytest.mark.parametrize("each", [_parameter(each) for each in CASES])
def test_lowers_for_cuda(each):
    exported = jax.export.export(jax.jit(each.function), platforms=["cuda"])(*each.args)
    assert "mosaic_gpu" in exported.mlir_module()
