"""The parts that every transformer has: norm, embedding, head, feed-forward."""

import jax
import jax.numpy as jnp

from dsv3_jax.model.functions import Functions
from dsv3_jax.typing import Array, Float, Int, Params


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], *, eps: float) -> Float[Array, "... D"]:
    """Divides each row by its root mean square, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale_row = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (x32 * inverse_rms * scale_row).astype(x.dtype)


def embed(params: Params, tokens: Int[Array, "B T"], *, functions: Functions) -> Float[Array, "B T D"]:
    """Looks up each token's row (the report's Emb)."""
    with jax.named_scope("embed"):
        return jnp.take(params["w"], tokens, axis=0).astype(functions.compute_dtype)


def unembed(params: Params, hidden: Float[Array, "... D"], *, functions: Functions) -> Float[Array, "... V"]:
    """Float32 logits (the report's OutHead). Training uses the chunked loss instead."""
    hidden, w = hidden.astype(functions.compute_dtype), params["w"].astype(functions.compute_dtype)
    contracted = (((hidden.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(hidden, w, contracted, preferred_element_type=jnp.float32)


def ffn(params: Params, x: Float[Array, "... D"], *, functions: Functions) -> Float[Array, "... D"]:
    """W_down·(silu(W_gate·x) ⊙ (W_up·x)), dense or of the shared experts; gate and up are one matmul."""
    gate_up = params["gate_up"]
    return functions.project_swiglu(functions.project(x, gate_up.reshape(gate_up.shape[0], -1)), params["down"])
