"""From logits to the next token."""

import jax
import jax.numpy as jnp

from dsv3_jax.typing import Array, Bool, Float, Int


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The most likely token; the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "B V"],
    key: jax.Array,
    *,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "B"]:
    """Draws from softmax(logits / temperature) restricted by `keep_mask`; temperature > 0."""
    logits = logits.astype(jnp.float32)
    below_best = logits - logits.max(axis=-1, keepdims=True)  # so that a tiny temperature gives 0 and -inf, never NaN
    scaled = below_best / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    kept = jnp.where(keep_mask(scaled, top_k=top_k, top_p=top_p), scaled, -jnp.inf)
    return jax.random.categorical(key, kept, axis=-1).astype(jnp.int32)


def keep_mask(logits: Float[Array, "B V"], *, top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """True for the `top_k` likeliest tokens (0: all) that also lie in the smallest set of probability ≥ `top_p`.

    top_k is applied first, top_p to what is left, renormalised. The likeliest token is always kept; ties keep the
    lowest ids.
    """
    V = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    descending = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(V)[None, :]
    in_top_k = (rank < top_k) | (top_k <= 0)
    probability = jax.nn.softmax(jnp.where(in_top_k, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    keep_sorted = in_top_k & ((before < top_p) | (top_p >= 1) | (rank == 0))  # the sum may round to 1 before its end
    return jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
