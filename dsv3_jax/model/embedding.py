"""Token embedding and the output head; untied, and shared with multi-token prediction."""

import jax
import jax.numpy as jnp

from dsv3_jax.precision.policy import Policy
from dsv3_jax.typing import Array, Float, Int, Params


def embed(params: Params, tokens: Int[Array, "B T"], *, policy: Policy) -> Float[Array, "B T D"]:
    """Looks up each token's row (the report's Emb)."""
    return jnp.take(params["w"], tokens, axis=0).astype(policy.compute_dtype)


def unembed(params: Params, hidden: Float[Array, "... D"], *, policy: Policy) -> Float[Array, "... V"]:
    """Float32 logits (the report's OutHead). Training uses the chunked loss instead."""
    w = params["w"].astype(policy.compute_dtype)
    return jax.lax.dot_general(
        hidden.astype(policy.compute_dtype),
        w,
        (((hidden.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
