"""The projections of a model in one dtype: the plain twins of `fp8_linear`."""

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.typing import Array, DType, Float
from dsv3_kernels.routed_experts.reference import swiglu


def linear(x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """x·w, both in `dtype`."""
    return jax.lax.dot_general(x.astype(dtype), w.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())))


def swiglu_linear(gate_up: Float[Array, "... F2"], w: Float[Array, "F Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """swiglu(gate_up)·w; gate and up are saved as "ffn_gate_up", what is made of them may be recomputed."""
    return linear(swiglu(checkpoint_name(gate_up, "ffn_gate_up")), w, dtype=dtype)


def attention_linear(x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """x·w, where x is what attention put out, saved as "mla_attended"."""
    return linear(checkpoint_name(x, "mla_attended"), w, dtype=dtype)
