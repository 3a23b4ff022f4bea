"""The cases of all ops are collected, and careless ones refused."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_kernels import dispatch
from dsv3_kernels.aot import case, selfcheck
from dsv3_kernels.aot.case import AotCase

GOOD = AotCase("op 1", jnp.sin, (jax.ShapeDtypeStruct((1,), jnp.float32),), (case.FP8_MMA,))


def test_cases_of_all_ops_follow_one_another():
    assert case.checked({"a": [GOOD], "b": [GOOD._replace(name="op 2")]}) == [GOOD, GOOD._replace(name="op 2")]


def test_careless_cases_are_refused():
    with pytest.raises(ValueError, match=r"ops \['b'\] have Pallas modules without cases"):
        case.checked({"a": [GOOD], "b": []})
    with pytest.raises(ValueError, match=r"cases \['op 1'\] require no instruction"):
        case.checked({"a": [GOOD._replace(must_contain=())]})
    with pytest.raises(ValueError, match=r"cases \['op 1'\] are named twice"):
        case.checked({"a": [GOOD], "b": [GOOD]})


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason=dispatch.why_no_pallas() or "")
def test_every_pallas_folder_takes_part():
    names = {each.name.split()[0] for each in case.collect()}
    assert {"cast_tokens", "swiglu_cast", "cast_blocks", "requantize_transposed"} <= names


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_PALLAS_JAX, reason=dispatch.why_no_pallas() or "")
def test_the_kernels_of_the_self_check_lower():
    for each in selfcheck.aot_cases():
        assert "mosaic_gpu" in jax.export.export(jax.jit(each.function), platforms=["cuda"])(*each.args).mlir_module()
