"""The projections of a model in one dtype: the plain twins of `fp8_linear`."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.typing import Array, DType, Float


def linear(x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """x·w, both in `dtype`."""
    return jax.lax.dot_general(x.astype(dtype), w.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())))


def swiglu(gate_up: Float[Array, "... F2"]) -> Float[Array, "... F"]:
    """silu(gate)·up, where the last axis holds all gates, then all ups (arXiv 2002.05202)."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_linear(gate_up: Float[Array, "... F2"], w: Float[Array, "F Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """swiglu(gate_up)·w; gate and up are saved as "ffn_gate_up", what is made of them may be recomputed."""
    return linear(swiglu(checkpoint_name(gate_up, "ffn_gate_up")), w, dtype=dtype)


def attention_linear(x: Float[Array, "... A"], w: Float[Array, "A Z"], *, dtype: DType) -> Float[Array, "... Z"]:
    """x·w, where x is what attention put out, saved as "mla_attended"."""
    return linear(checkpoint_name(x, "mla_attended"), w, dtype=dtype)
