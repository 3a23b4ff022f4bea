"""Memory for a model is zeros that JAX takes over, or a clear refusal."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.interop.fill import zeros
from dsv3_jax.model.params import ParamSpec


def test_memory_is_aligned_zeros_of_each_shape():
    specs = {
        "a": ParamSpec((3, 5), jnp.dtype(jnp.bfloat16), (None, None)),
        "b": ParamSpec((0,), np.dtype("f4"), (None,)),
    }
    arrays = zeros(specs)
    assert {path: (array.shape, array.dtype) for path, array in arrays.items()} == {
        path: (spec.shape, spec.dtype) for path, spec in specs.items()
    }
    assert all(array.ctypes.data % 64 == 0 and not array.any() for array in arrays.values())


def test_a_model_without_room_is_a_memory_error():
    with pytest.raises(MemoryError, match="bytes"):
        zeros({"a": ParamSpec((2**60,), np.dtype("f4"), (None,))})
